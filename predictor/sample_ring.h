// What the learned policy has looked at and waits to hear about.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "predictor/learned_model.h"
#include "predictor/learned_page.h"
#include "predictor/page.h"

namespace presync {

// A ring of samples in the order in which they were taken. Each horizon has its own place in the
// ring and comes by each sample when that horizon has passed; a page whose stamp is not the
// sample's any more was written meanwhile. Constant memory, about 1 MB. Not thread-safe.
class SampleRing {
 public:
  SampleRing() : ring_(kSamples) {}

  // Takes a sample of `page`, which looks like `cells`. Dropped if the ring is full.
  void Add(PageIndex page, uint32_t now, const LearnedPage& word, const LearnedModel::Cells& cells);

  // Teaches the model everything whose horizon ends in scan `now`. `pages`: all words.
  void LearnDue(uint32_t now, const LearnedPage* pages, LearnedModel* model);

  // One write in how many to follow when a scan has `written` pages: all at first, fewer once the
  // model has seen much, and never more than the ring can take.
  uint32_t FollowOneIn(PageCount written) const;

 private:
  static constexpr uint64_t kSamples = 1 << 15;

  struct Sample {
    PageIndex page;
    uint32_t scan;
    uint16_t stamp;
    LearnedModel::Cells cells;
  };

  std::vector<Sample> ring_;
  uint64_t added_ = 0;
  std::array<uint64_t, LearnedModel::kHorizons> learned_{};  // samples that each horizon passed
};

}  // namespace presync
