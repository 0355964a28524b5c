// Which pages end their arming back-off in which scan (docs/prediction.md, "Arming back-off").
#pragma once

#include <array>
#include <cstdint>
#include <vector>

#include "predictor/page.h"

namespace presync {

// A ring of one list of runs for each of the next 32 scans. Bounded: at most `max_runs` runs in
// all. Entries are hints: the owner checks each page when it comes back, because it may have been
// sent or filed again meanwhile. Not thread-safe.
class ArmingRing {
 public:
  static constexpr uint32_t kScans = 32;

  explicit ArmingRing(uint32_t max_runs) : max_runs_(max_runs) {}

  // Files `page` for scan `due`, less than kScans after the last TakeDue. False if the ring is
  // full.
  bool Add(PageIndex page, uint32_t due);

  // Takes out what was filed for scan `now`: runs sorted by first page, which may overlap. To be
  // called once for each scan, in order.
  std::vector<PageRun> TakeDue(uint32_t now);

  uint32_t runs() const { return runs_; }

 private:
  uint32_t max_runs_;
  uint32_t runs_ = 0;
  std::array<std::vector<PageRun>, kScans> due_;
};

}  // namespace presync
