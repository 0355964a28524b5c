// The learned policy's model: how likely is a page to be written again within so many scans, given
// what its word and its neighbourhood look like. docs/prediction.md, "The learned policy".
//
// For each horizon the log-odds are the sum of a fixed prior, which knows only the usual gap and
// the age, and of one correction from each of several tables, each indexed by another context of
// the page. When it is known whether the page was written, each table's correction moves against
// the error of the sum, in ever smaller steps. (Hashed perceptron branch predictors sum tables like
// this: Tarjan and Skadron, ACM TACO 2005.)
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "absl/types/span.h"
#include "predictor/order_contest.h"
#include "predictor/page.h"

namespace presync {

// Integers only: the same calls give the same answers on any machine. Memory is constant: about
// 0.6 MB. Not thread-safe.
class LearnedModel {
 public:
  static constexpr size_t kHorizons = 7;
  static constexpr std::array<uint32_t, kHorizons> kHorizonScans = {1, 2, 4, 8, 32, 128, 512};
  static constexpr size_t kContexts = 9;
  // Ages are looked at in classes: class k begins at kClassAges[k] scans.
  static constexpr size_t kAgeClasses = 12;
  static constexpr std::array<uint32_t, kAgeClasses> kClassAges = {0,  1,  3,   6,   12,  24,
                                                                   48, 96, 192, 384, 768, 1536};
  // Scores are below this, with what a page gets for its age and gap.
  static constexpr uint32_t kScores = 416;
  // What a page gets besides, in 1/32 of Log2Sixteenths(age + 1) and of the larger of that and the
  // usual gap: by how much the rivals of the contest differ. A little of the gap always, for the
  // tables leave ties.
  struct Weights {
    uint32_t age, gap;
  };
  static constexpr std::array<Weights, OrderContest::kByAge> kWeights = {
      {{0, 3}, {3, 3}, {13, 3}, {0, 27}}};

  // What is looked at of a page. Ranges: `age_class` below kAgeClasses, `gap_log2_quarters` below
  // 64, and 32 bits for all others together with their hashing.
  struct Features {
    PageIndex page;
    uint32_t age_class;
    uint32_t gap_log2_quarters;  // the usual gap
    uint32_t last_gap;           // below 32
    uint32_t writes;             // below 4
    uint32_t run_log4;           // below 4
    uint32_t stamp;              // of the last write
    uint32_t written_then_log2;  // pages written in that scan, as log2, below 32
    uint32_t written_now_log2;   // and in this one
    uint32_t before, after;      // the neighbours against the page itself, below 16
  };

  // Where a page's contexts are in the tables, and which prior it has.
  struct Cells {
    std::array<uint16_t, kContexts> entry;
    uint8_t age_class;
    uint8_t gap_log2_quarters;
  };

  LearnedModel();

  static Cells Locate(const Features& features);

  // Which page to send first: the highest, for each weight of its age. Falls with the probability
  // that the page is written soon; short horizons count more.
  OrderContest::Scores Scores(const Cells& cells) const;

  // Learns that a page that looked like `cells` was `written` or not within
  // kHorizonScans[horizon].
  void Learn(const Cells& cells, size_t horizon, bool written);

 private:
  uint32_t Score(const Cells& cells) const;

  // The corrections of the horizons in 1/1024 of a natural log-odd, and how often the entry
  // learned; 16 bytes, so that one load brings all, and one addition adds all.
  struct alignas(16) Entry {
    std::array<int16_t, kHorizons + 1> lanes;
  };
  static constexpr size_t kEntries = 4096;

  const Entry& At(const Cells& cells, size_t context) const {
    return tables_[context * kEntries + cells.entry[context]];
  }

  std::vector<Entry> tables_;
};

}  // namespace presync
