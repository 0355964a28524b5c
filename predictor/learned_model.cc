#include "predictor/learned_model.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>

#include "predictor/learned_page.h"

namespace presync {
namespace {

using Model = LearnedModel;

// The tables below are made by the compiler, in doubles, from sums and products alone: no library
// whose last bit might differ.
constexpr double Exp(double x) {
  double sum = 1, term = 1;
  for (int i = 1; i < 24; ++i) sum += term *= x / 1024 / i;
  for (int i = 0; i < 10; ++i) sum *= sum;
  return sum;
}

constexpr double Log(double y) {
  double x = 0;
  for (int i = 0; i < 100; ++i) x += 2 * (y - Exp(x)) / (y + Exp(x));
  return x;
}

constexpr int kUnit = 1024;        // of log-odds
constexpr int kLimit = 8 * kUnit;  // sums are cut here: 1 in 3000
constexpr int kCertain = 4096;     // of probabilities
// An error that teaches hardly anything, but costs as much.
constexpr int kSmallError = kCertain / 16;
// Of one table's correction: with the prior, below 4 units, the sum of all fits 16 bits. (So does
// that of the lanes which count what was learned.)
constexpr int kCorrectionLimit = 3 * kUnit;
static_assert(Model::kContexts * kCorrectionLimit + 4 * kUnit < 1 << 15);

// Of the sum of log-odds, in steps of 16.
constexpr auto kSigmoid = [] {
  std::array<int16_t, 2 * kLimit / 16> table{};
  for (size_t i = 0; i < table.size(); ++i) {
    const double log_odds = (16.0 * static_cast<double>(i) + 8 - kLimit) / kUnit;
    table[i] = static_cast<int16_t>(kCertain / (1 + Exp(-log_odds)) + 0.5);
  }
  return table;
}();

constexpr int Probability(int log_odds) {
  return kSigmoid[(std::clamp(log_odds, -kLimit, kLimit - 1) + kLimit) / 16];
}

// The prior: 1 - exp(-(horizon / gap)^0.7), the gap being the larger of the usual one and the age:
// a stretched exponential, since real pages write in bursts. As log-odds, by quarters of an octave
// of horizon / gap.
constexpr int kPriorLow = -64;
constexpr auto kPrior = [] {
  std::array<int16_t, 128> table{};
  for (size_t i = 0; i < table.size(); ++i) {
    const double octaves = (static_cast<int>(i) + kPriorLow) / 4.0;
    const double power = Exp(0.7 * 0.693147180559945 * octaves);
    const double log_odds = power > 8 ? 3.9 : Log(Exp(power) - 1);
    table[i] = static_cast<int16_t>(std::clamp(log_odds, -3.9, 3.9) * kUnit);
  }
  return table;
}();

// kPrior by age class and usual gap, one row of all horizons and a lane to spare each.
constexpr auto kPriors = [] {
  std::array<std::array<std::array<int16_t, 8>, 64>, Model::kAgeClasses> rows{};
  for (size_t age_class = 0; age_class < Model::kAgeClasses; ++age_class) {
    const uint32_t age = Log2Sixteenths(Model::kClassAges[age_class] + 1) / 4;
    for (uint32_t gap = 0; gap < 64; ++gap) {
      for (size_t h = 0; h < Model::kHorizons; ++h) {
        const uint32_t quarters = Log2Sixteenths(Model::kHorizonScans[h]) / 4;
        rows[age_class][gap][h] = kPrior[quarters - std::max(gap, age) - kPriorLow];
      }
    }
  }
  return rows;
}();

const std::array<int16_t, 8>& Priors(const Model::Cells& cells) {
  return kPriors[cells.age_class][cells.gap_log2_quarters];
}

// How far a correction moves, in 1/1024 of the error: 0.7 / (n + 2), not below 0.03 so that it
// never ceases to follow the guest.
constexpr auto kRate = [] {
  std::array<int16_t, 128> table{};
  for (size_t i = 0; i < table.size(); ++i) {
    const double n = static_cast<double>(i / 4);
    table[i] = static_cast<int16_t>(kUnit * std::max(0.7 / (n + 2), 0.03));
  }
  return table;
}();

// What a probability counts in the score: a page that is written at once costs its whole transfer,
// one that is written much later was worth sending for so long.
constexpr std::array<int, Model::kHorizons> kWeight = {2, 2, 2, 1, 1, 1, 1};

// Scores by probability alone are at most this.
constexpr uint32_t kMostSure = 191;
static_assert(Log2Sixteenths(10 * kCertain + 64) - Log2Sixteenths(64) <= kMostSure);
static_assert(std::ranges::all_of(Model::kWeights, [](const Model::Weights& weights) {
  return kMostSure + 63 * 4 * weights.gap / 32 +
             Log2Sixteenths(Model::kClassAges.back() + 1) * weights.age / 32 <
         Model::kScores;
}));

// Eight lanes, for seven horizons, that are added at once.
typedef int16_t Lanes __attribute__((vector_size(16)));
Lanes Load(const std::array<int16_t, 8>& lanes) {
  Lanes loaded;
  std::memcpy(&loaded, lanes.data(), sizeof(loaded));
  return loaded;
}

// For keys that are wider than an index: multiplicative, the high bits.
uint16_t Hash(uint32_t key) { return static_cast<uint16_t>(key * 0x9e3779b1 >> (32 - 12)); }

}  // namespace

LearnedModel::LearnedModel() : tables_(kContexts * kEntries) {}

LearnedModel::Cells LearnedModel::Locate(const Features& f) {
  const uint32_t age = f.age_class;
  const uint32_t gap = f.last_gap == LearnedPage::kUnseen ? 31 : f.gap_log2_quarters / 2;
  Cells cells;
  cells.age_class = static_cast<uint8_t>(age);
  cells.gap_log2_quarters = static_cast<uint8_t>(f.gap_log2_quarters);
  static_assert(kEntries == 1 << 12 && kAgeClasses <= 1 << 4);
  cells.entry = {
      static_cast<uint16_t>(age | gap << 4 | f.writes << 9),
      static_cast<uint16_t>(age | f.written_then_log2 << 4 | f.run_log4 << 9),
      static_cast<uint16_t>(age | f.before << 4 | f.after << 8),
      Hash(age | gap << 4 | f.last_gap << 9),
      Hash(age | f.page >> 4 << 4),
      Hash(age | f.page >> 9 << 4 | f.last_gap << 24),
      Hash(age | f.stamp << 4),
      Hash(age | f.after << 4 | gap << 8),
      Hash(age | gap << 4 | f.written_now_log2 << 9),
  };
  return cells;
}

uint32_t LearnedModel::Score(const Cells& cells) const {
  Lanes log_odds = Load(Priors(cells));
  for (size_t i = 0; i < kContexts; ++i) log_odds += Load(At(cells, i).lanes);
  // Cut and scaled in lanes, too.
  const Lanes lowest = Lanes{} - kLimit;
  const Lanes highest = Lanes{} + (kLimit - 1);
  log_odds = log_odds < lowest ? lowest : log_odds;
  log_odds = log_odds > highest ? highest : log_odds;
  std::array<int16_t, 8> index;
  const Lanes scaled = (log_odds - lowest) >> 4;
  std::memcpy(index.data(), &scaled, sizeof(scaled));
  int sum = 0;
  for (size_t h = 0; h < kHorizons; ++h) {
    sum += kWeight[h] * kSigmoid[static_cast<uint16_t>(index[h])];
  }
  // By the logarithm: cold pages differ by little, and they are the ones that are sent.
  return kMostSure - (Log2Sixteenths(static_cast<uint32_t>(sum) + 64) - Log2Sixteenths(64));
}

OrderContest::Scores LearnedModel::Scores(const Cells& cells) const {
  const uint32_t age = Log2Sixteenths(kClassAges[cells.age_class] + 1);
  const uint32_t gap = std::max<uint32_t>(age, cells.gap_log2_quarters * 4);
  const uint32_t score = Score(cells);
  OrderContest::Scores scores;
  for (size_t i = 0; i < kWeights.size(); ++i) {
    scores[i] =
        static_cast<uint16_t>(score + gap * kWeights[i].gap / 32 + age * kWeights[i].age / 32);
  }
  scores[OrderContest::kByAge] = static_cast<uint16_t>(age);
  return scores;
}

void LearnedModel::Learn(const Cells& cells, size_t horizon, bool written) {
  int log_odds = Priors(cells)[horizon];
  for (size_t i = 0; i < kContexts; ++i) log_odds += At(cells, i).lanes[horizon];
  const int error = (written ? kCertain : 0) - Probability(log_odds);
  if (std::abs(error) < kSmallError) return;
  static_assert(kCertain == 1 << 12);
  for (size_t i = 0; i < kContexts; ++i) {
    std::array<int16_t, kHorizons + 1>& lanes = tables_[i * kEntries + cells.entry[i]].lanes;
    const int learned = lanes[kHorizons];
    const int correction = lanes[horizon] + ((error * kRate[learned] + kCertain / 2) >> 12);
    lanes[horizon] =
        static_cast<int16_t>(std::clamp(correction, -kCorrectionLimit, kCorrectionLimit));
    lanes[kHorizons] = static_cast<int16_t>(std::min<int>(learned + 1, kRate.size() - 1));
  }
}

}  // namespace presync
