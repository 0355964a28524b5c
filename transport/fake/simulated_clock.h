// A clock for tests that moves only when someone waits. Thread-safe.
#pragma once

#include <algorithm>

#include "absl/base/thread_annotations.h"
#include "absl/time/time.h"
#include "transport/mutex.h"

namespace presync {

class SimulatedClock {
 public:
  absl::Time Now() const {
    MutexLock lock(&mu_);
    return now_;
  }
  // Time never goes back.
  void AdvanceTo(absl::Time time) {
    MutexLock lock(&mu_);
    now_ = std::max(now_, time);
  }

 private:
  mutable Mutex mu_;
  absl::Time now_ ABSL_GUARDED_BY(mu_) = absl::UnixEpoch();
};

}  // namespace presync
