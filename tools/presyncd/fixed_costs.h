// What a handover cost on this host, apart from moving memory: measured at each launch, per target,
// and kept over restarts, so that a promise rests on figures of this place.
#pragma once

#include <map>
#include <string>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"

namespace presync {

// Thread-safe.
class FixedCosts {
 public:
  // Reads `path` if it is there; a file that can't be read counts as empty.
  explicit FixedCosts(std::string path);

  // The cost measured for `peer`, or `fallback`.
  absl::Duration For(const std::string& peer, absl::Duration fallback) const
      ABSL_LOCKS_EXCLUDED(mutex_);

  // A launch to `peer` took `cost` besides moving memory. Moves the figure by half the difference.
  void Learn(const std::string& peer, absl::Duration cost) ABSL_LOCKS_EXCLUDED(mutex_);

 private:
  const std::string path_;
  mutable absl::Mutex mutex_;
  std::map<std::string, absl::Duration> costs_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace presync
