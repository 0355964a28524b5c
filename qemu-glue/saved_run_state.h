// What a QEMU's device state says of the guest itself: whether it ran when it was stopped to be
// saved.
#pragma once

#include <string>

#include "absl/strings/string_view.h"

namespace presync {

// Reads the section "globalstate" out of a migration stream as that passes by (QEMU,
// migration/global_state.c, in every stream since machine types of 2.4). QEMU notes the run state
// there in one go with stopping the guest, so a `stop` of somebody else's came before or not at
// all. A guest may forge it by what it puts into a device: as "paused" it stays where it is.
class SavedRunState {
 public:
  // The next piece of the stream. Any cuts.
  void Take(absl::string_view bytes);
  // "running", "paused", "io-error" ...; empty: the section has not passed.
  const std::string& run_state() const { return run_state_; }

 private:
  std::string window_;
  std::string run_state_;
};

}  // namespace presync
