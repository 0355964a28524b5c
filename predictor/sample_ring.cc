#include "predictor/sample_ring.h"

#include <algorithm>

namespace presync {

void SampleRing::Add(PageIndex page, uint32_t now, const LearnedPage& word,
                     const LearnedModel::Cells& cells) {
  if (added_ - learned_.back() == kSamples) return;
  ring_[added_++ % kSamples] = {page, now, static_cast<uint16_t>(word.stamp()), cells};
}

void SampleRing::LearnDue(uint32_t now, const LearnedPage* pages, LearnedModel* model) {
  for (size_t horizon = 0; horizon < LearnedModel::kHorizons; ++horizon) {
    for (uint64_t& next = learned_[horizon]; next < added_; ++next) {
      const Sample& sample = ring_[next % kSamples];
      if (now - sample.scan < LearnedModel::kHorizonScans[horizon]) break;
      model->Learn(sample.cells, horizon, pages[sample.page].stamp() != sample.stamp);
    }
  }
}

uint32_t SampleRing::FollowOneIn(PageCount written) const {
  // A followed write makes about three samples before the page is written again.
  constexpr uint64_t kPerScan = kSamples / LearnedModel::kHorizonScans.back() / 3;
  const uint64_t enough = added_ < (1 << 15) ? 1 : 16;
  return static_cast<uint32_t>(std::max<uint64_t>(enough, written / kPerScan));
}

}  // namespace presync
