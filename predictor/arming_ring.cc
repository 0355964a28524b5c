#include "predictor/arming_ring.h"

#include <algorithm>
#include <utility>

namespace presync {

bool ArmingRing::Add(PageIndex page, uint32_t due) {
  std::vector<PageRun>& slot = due_[due % kScans];
  if (!slot.empty() && slot.back().end() == page) {
    ++slot.back().count;
    return true;
  }
  if (runs_ == max_runs_) return false;
  slot.push_back({page, 1});
  ++runs_;
  return true;
}

std::vector<PageRun> ArmingRing::TakeDue(uint32_t now) {
  // The slot gives its memory away, so that all slots together stay near what the runs need.
  std::vector<PageRun> taken = std::exchange(due_[now % kScans], {});
  runs_ -= static_cast<uint32_t>(taken.size());
  std::sort(taken.begin(), taken.end(),
            [](const PageRun& a, const PageRun& b) { return a.first < b.first; });
  return taken;
}

}  // namespace presync
