// A clock for tests that moves only when someone waits. Thread-safe.
#pragma once

#include <algorithm>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"

namespace presync {

class SimulatedClock {
 public:
  absl::Time Now() const {
    absl::MutexLock lock(&mu_);
    return now_;
  }
  // Time never goes back.
  void AdvanceTo(absl::Time time) {
    absl::MutexLock lock(&mu_);
    now_ = std::max(now_, time);
  }

 private:
  mutable absl::Mutex mu_;
  absl::Time now_ ABSL_GUARDED_BY(mu_) = absl::UnixEpoch();
};

}  // namespace presync
