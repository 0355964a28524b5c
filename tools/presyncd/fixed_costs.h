// What a handover cost on this host, apart from moving memory: measured at each launch, per target,
// and kept over restarts, so that a promise rests on figures of this place. The median of the
// newest launches, so that one which was disturbed changes nothing: on a host that was busy for a
// moment a launch took 0.7 s (2026-11-24), and no promise below that could be made for long after
// it.
#pragma once

#include <map>
#include <string>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/time/time.h"
#include "transport/mutex.h"

namespace presync {

// Thread-safe.
class FixedCosts {
 public:
  // Reads `path` if it is there; what can't be read in it is left out.
  explicit FixedCosts(std::string path);

  // The median of the newest costs measured for `peer`, `expected` being one of them; of two that
  // are in the middle the lower.
  absl::Duration For(const std::string& peer, absl::Duration expected) const
      ABSL_LOCKS_EXCLUDED(mutex_);

  // A launch to `peer` took `cost` besides moving memory.
  void Learn(const std::string& peer, absl::Duration cost) ABSL_LOCKS_EXCLUDED(mutex_);

 private:
  const std::string path_;
  mutable Mutex mutex_;
  std::map<std::string, std::vector<absl::Duration>> costs_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace presync
