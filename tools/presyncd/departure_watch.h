// Notices QEMUs that come up at the monitors of guests that left this host: whoever started one (a
// service that restarts it, an autostart, a person), the guest runs elsewhere.
#pragma once

#include <functional>
#include <string>
#include <utility>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "transport/mutex.h"
#include "transport/sync/recovery.h"

namespace presync {

// Look() by one thread, open() by any.
class DepartureWatch {
 public:
  using Log = std::function<void(bool problem, const std::string& line)>;

  // `folder` has the notes (transport/sync/departures.h).
  DepartureWatch(std::string folder, Log log) : folder_(std::move(folder)), log_(std::move(log)) {}

  // Holds still what runs where a guest left; call it each second. One that came by a migration is
  // the guest itself, which is back: its note goes. Guests that `in_use` names are left alone.
  // Blocks for some seconds at most for each monitor that does not answer.
  void Look(const Recovery::InUse& in_use) ABSL_LOCKS_EXCLUDED(mutex_);

  std::vector<OpenMatter> open() const ABSL_LOCKS_EXCLUDED(mutex_);

 private:
  absl::Status LookAt(const HandoverEntry& departure);

  const std::string folder_;
  const Log log_;
  mutable Mutex mutex_;
  std::vector<OpenMatter> open_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace presync
