// What the syncs of this host did lately: a sample of each guest's sync every second, and how its
// launches went. In memory and bounded: when a sync's samples are many, every second one goes and
// half as many are taken, so that the first and the last always stay. For `presync report`.
#pragma once

#include <cstddef>
#include <deque>
#include <map>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "transport/mutex.h"
#include "transport/sync/source_session.h"

namespace presync {

// Thread-safe.
class History {
 public:
  static constexpr size_t kMostSamples =
      1200;  // of one guest: twenty minutes before the first halving
  static constexpr size_t kMostLaunches = 16;  // of one guest
  static constexpr size_t kMostGuests = 256;   // the one that was seen longest ago goes

  // Call it about once a second for each sync. A new session of a guest starts its samples afresh.
  void Sample(const SessionStatus& status, absl::Time now) ABSL_LOCKS_EXCLUDED(mutex_);

  // A launch that was ordered at `ordered_at` ended. `status`: after it.
  void NoteLaunch(const SessionStatus& status, absl::Time ordered_at,
                  const absl::StatusOr<HandoverReport>& report) ABSL_LOCKS_EXCLUDED(mutex_);

  // {"name", "to", "samples": [...], "launches": [...]}: docs/protocol.md, "report".
  // NOT_FOUND: no such guest was kept in sync since presyncd started.
  absl::StatusOr<nlohmann::json> Report(const std::string& guest) const ABSL_LOCKS_EXCLUDED(mutex_);

 private:
  struct Point {
    absl::Time at;
    absl::string_view state;
    std::string link;
    PageCount residual = 0;
    PageCount set_point = 0;
    uint64_t wire_bytes = 0;
    uint64_t pages_differing = 0;
    uint64_t resent_bytes = 0;
    absl::Duration predicted_launch = absl::InfiniteDuration();
    double dirty_pages_per_s = 0;
  };
  struct Guest {
    SessionStatus newest;
    absl::Time since, seen;
    std::vector<Point> points;
    size_t stride = 1;   // of how many looks one becomes a point
    size_t skipped = 0;  // looks since the newest point
    std::deque<nlohmann::json> launches;
  };

  Guest* Find(const SessionStatus& status, absl::Time now) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);

  mutable Mutex mutex_;
  std::map<std::string, Guest> guests_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace presync
