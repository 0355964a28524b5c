// The comparison of all guest memory at a handover (`presync launch --verify`). Both sides hash,
// the source compares.
//
// The target hashes ahead, while the guest still runs at the source, and once more at the end what
// it was sent meanwhile: that is known here, for nobody else writes the target's memory. The source
// hashes while its guest stands still, and all of it: a write that dirty tracking did not see is
// just what has to be found.
#pragma once

#include <future>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "predictor/page.h"
#include "transport/memory.h"
#include "transport/sync/page_hash.h"
#include "transport/sync/source_sync.h"
#include "transport/wire/control_channel.h"

namespace presync {

wire::ControlMessage MakeHashRequest(const HashPlan& plan);
// INVALID_ARGUMENT: it does not answer `plan`.
absl::Status CheckHashReply(const wire::HashReply& reply, const HashPlan& plan);

// One thread uses it. The calls come in the order in which they stand here.
class MemoryComparison {
 public:
  // Both must outlive it. Precondition: sync->NoteWrites() was called just now.
  MemoryComparison(const GuestMemory* memory, SourceSync* sync);

  // The order to hash ahead, to be sent at once. Its reply is due while the guest still runs.
  wire::ControlMessage HashAhead();

  // A reply of the target. INVALID_ARGUMENT: it is not what was asked for.
  absl::Status OnReply(const wire::HashReply& reply);
  bool awaits_reply() const { return asked_.has_value(); }

  // The guest stands still: begins to hash here, in a thread of its own.
  void OnGuestStopped();
  // Something was written nevertheless: begins again.
  void OnWrittenSinceStop();

  // Everything is confirmed: the order to hash again what was written since HashAhead; nothing if
  // that is nothing.
  std::optional<wire::ControlMessage> HashAgain();

  // No reply is due any more: the ranges that differ. Blocks until this side has hashed. Errors as
  // HashPages.
  absl::StatusOr<std::vector<PageRun>> Differing();

 private:
  wire::ControlMessage Ask(HashPlan plan);

  const GuestMemory* const memory_;
  SourceSync* const sync_;
  const HashPlan all_;
  std::optional<HashPlan> asked_;  // until the reply comes
  std::string theirs_;             // the target's newest hash of each range of all_
  std::future<absl::StatusOr<std::string>> ours_;
};

}  // namespace presync
