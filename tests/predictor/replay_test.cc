#include "predictor/replay.h"

#include <algorithm>
#include <bit>
#include <map>
#include <memory>
#include <random>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace presync {
namespace {

Trace MakeTrace(PageCount pages, const std::vector<std::vector<PageIndex>>& scans) {
  Trace trace({4096, 100'000, pages});
  for (const auto& scan : scans) {
    std::vector<PageRun> runs;
    for (PageIndex page : scan) AppendRun({page, 1}, &runs);
    trace.AddScan(runs);
  }
  return trace;
}

ReplayResult ReplayOf(const Trace& trace, std::string_view name, PageCount set_point) {
  auto policy = MakePolicy(name, trace.header().pages);
  EXPECT_TRUE(policy.ok()) << policy.status();
  return Replay(trace, **policy, {.set_point = set_point});
}

ReplayResult RunOptimum(const Trace& trace, PageCount set_point) {
  const auto policy = MakeOptimum(trace);
  return Replay(trace, *policy, {.set_point = set_point});
}

// The fewest pages that any choice sends, by trying all of them.
class BruteForce {
 public:
  BruteForce(const std::vector<std::vector<PageIndex>>& scans, size_t set_point)
      : scans_(scans), set_point_(set_point) {}

  int Least(size_t scan, std::set<PageIndex> stale) {
    if (scan == scans_.size()) return 0;
    stale.insert(scans_[scan].begin(), scans_[scan].end());
    const auto key = std::make_pair(scan, stale);
    if (const auto known = known_.find(key); known != known_.end()) return known->second;
    int best = 1 << 20;
    const std::vector<PageIndex> pages(stale.begin(), stale.end());
    for (uint32_t sent = 0; sent < 1u << pages.size(); ++sent) {
      std::set<PageIndex> left;
      for (size_t i = 0; i < pages.size(); ++i) {
        if (!(sent >> i & 1)) left.insert(pages[i]);
      }
      if (left.size() > set_point_) continue;
      best = std::min(best, std::popcount(sent) + Least(scan + 1, left));
    }
    return known_[key] = best;
  }

 private:
  const std::vector<std::vector<PageIndex>>& scans_;
  size_t set_point_;
  std::map<std::pair<size_t, std::set<PageIndex>>, int> known_;
};

TEST(OptimumTest, SendsAsFewAsTryingEverything) {
  constexpr uint32_t kSeed = 21;
  std::mt19937 random(kSeed);
  for (int round = 0; round < 60; ++round) {
    constexpr PageCount kPages = 6;
    std::vector<std::vector<PageIndex>> scans(7);
    for (auto& scan : scans) {
      for (PageIndex page = 0; page < kPages; ++page) {
        if (random() % 3 == 0) scan.push_back(page);
      }
    }
    for (PageCount set_point = 0; set_point <= 4; ++set_point) {
      SCOPED_TRACE(testing::Message()
                   << "seed " << kSeed << ", round " << round << ", set-point " << set_point);
      const Trace trace = MakeTrace(kPages, scans);
      const ReplayResult optimum = RunOptimum(trace, set_point);
      EXPECT_EQ(optimum.pages_sent,
                static_cast<uint64_t>(BruteForce(scans, set_point).Least(0, {})));
      EXPECT_LE(optimum.residual_max_pages, set_point);
      for (std::string_view name : {"learned", "ewma", "oldest", "skip-if-dirty"}) {
        EXPECT_GE(ReplayOf(trace, name, set_point).pages_sent, optimum.pages_sent)
            << std::string(name);
      }
    }
  }
}

// Pages that are written at random, each with a rate of its own that never changes: whoever knows
// the rates sends less than all that have to learn them, and more than who knows the times.
TEST(KnownRatesTest, BoundsEveryPolicyWhereWritesAreMemoryless) {
  constexpr uint32_t kSeed = 31;
  std::mt19937 random(kSeed);
  std::vector<std::vector<PageIndex>> scans(3000);
  for (auto& scan : scans) {
    for (PageIndex page = 0; page < 400; ++page) {
      if (random() % (2 + page) == 0) scan.push_back(page);
    }
  }
  const Trace trace = MakeTrace(400, scans);
  for (PageCount set_point : {20, 60, 150}) {
    SCOPED_TRACE(testing::Message() << "seed " << kSeed << ", set-point " << set_point);
    const uint64_t bound =
        Replay(trace, *MakeKnownRates(trace, scans.size()), {.set_point = set_point}).pages_sent;
    EXPECT_GT(bound, RunOptimum(trace, set_point).pages_sent);
    for (std::string_view name : {"learned", "ewma", "oldest", "skip-if-dirty"}) {
      EXPECT_GT(ReplayOf(trace, name, set_point).pages_sent, bound) << std::string(name);
    }
  }
}

TEST(KnownRatesTest, CountsBeforeAndAfterAndNoFurther) {
  const auto sent = [](const std::vector<std::vector<PageIndex>>& scans, size_t within) {
    const Trace trace = MakeTrace(2, scans);
    return Replay(trace, *MakeKnownRates(trace, within), {.set_point = 1}).pages_sent;
  };
  const std::vector<std::vector<PageIndex>> ahead = {{0, 1}, {0}, {1}, {1}};
  EXPECT_EQ(sent(ahead, 0), 3u) << "0, for both look alike; 1; 0";
  EXPECT_EQ(sent(ahead, 1), 2u) << "1, since 0 comes again; 0";
  const std::vector<std::vector<PageIndex>> behind = {{0}, {0}, {0}, {}, {1}, {}, {1}, {0}, {1}};
  EXPECT_EQ(sent(behind, 2), 2u) << "0, whose writes are long ago; and 0 once more";
  EXPECT_EQ(sent(behind, 9), 3u) << "1 every time";
}

// Page 0 is written in every scan, 1 in every other, 2 only once.
TEST(ReplayTest, CountsByHand) {
  const Trace trace = MakeTrace(4, {{0, 1, 2}, {0}, {0, 1}, {0}});
  const ReplayResult optimum = RunOptimum(trace, 2);
  EXPECT_EQ(optimum.pages_sent, 1u);
  EXPECT_EQ(optimum.write_faults, 3u);
  EXPECT_EQ(optimum.pages_written, 7u);
  EXPECT_EQ(optimum.scans, 4u);
  EXPECT_EQ(optimum.residual_p95_pages, 2u);
  EXPECT_EQ(optimum.residual_mean_pages, 2.0);
  EXPECT_EQ(optimum.launch_mean, absl::InfiniteDuration());
}

TEST(ReplayTest, TheBaselinesSendWhatPlainCountingSays) {
  constexpr uint32_t kSeed = 2;
  std::mt19937 random(kSeed);
  std::vector<std::vector<PageIndex>> scans(97);
  for (auto& scan : scans) {
    for (PageIndex page = 0; page < 300; ++page) {
      if (random() % (1 + page) == 0) scan.push_back(page);
    }
  }
  const Trace trace = MakeTrace(300, scans);
  const ReplayResult every_scan = ReplayOf(trace, "every-scan", 50);
  EXPECT_EQ(every_scan.pages_sent, EveryScanPages(trace)) << "seed " << kSeed;
  EXPECT_EQ(every_scan.residual_max_pages, 0u);
  EXPECT_EQ(every_scan.write_faults, trace.pages_written());
  const ReplayResult once_a_second = ReplayOf(trace, "once-a-second", 50);
  EXPECT_EQ(once_a_second.pages_sent, OnceASecondPages(trace)) << "seed " << kSeed;
  EXPECT_LT(OnceASecondPages(trace), EveryScanPages(trace));
}

TEST(ReplayTest, TheLinkLimitsAScanAndPredictsLaunches) {
  // 10 pages of 4096 bytes in a scan of 100 ms.
  const LaunchCost cost = {absl::Milliseconds(20), 409'600};
  std::vector<PageIndex> burst;
  for (PageIndex page = 0; page < 35; ++page) burst.push_back(page);
  const Trace trace = MakeTrace(100, {burst, {}, {}, {}});
  const auto policy = MakePolicy("oldest", 100).value();
  const ReplayResult result = Replay(trace, *policy, {.set_point = 5, .cost = cost});
  EXPECT_EQ(result.pages_sent, 30u);
  EXPECT_EQ(result.residual_max_pages, 25u);
  EXPECT_EQ(result.residual_mean_pages, (25 + 15 + 5 + 5) / 4.0);
  EXPECT_EQ(result.residual_p95_pages, 25u);
  EXPECT_EQ(result.launch_p95, absl::Milliseconds(20 + 250));
  EXPECT_EQ(result.launch_mean, absl::Milliseconds(20 + 125));
}

// Sends in address order, and takes the time that it says.
class SlowPolicy final : public SendPolicy {
 public:
  explicit SlowPolicy(absl::Duration* clock) : clock_(clock) {}
  std::string_view name() const override { return "slow"; }
  void OnScan(absl::Span<const PageRun>) override { *clock_ += absl::Nanoseconds(100); }
  void AppendPagesToArm(std::vector<PageRun>*) override { *clock_ += absl::Nanoseconds(20); }
  void Choose(const PageBitmap& candidates, PageCount, std::vector<PageRun>* chosen) override {
    candidates.AppendRunsWithin({0, candidates.size()}, chosen);
    *clock_ += absl::Nanoseconds(3);
  }
  void OnSent(absl::Span<const PageRun>) override { *clock_ += absl::Nanoseconds(1000); }

 private:
  absl::Duration* clock_;
};

TEST(ReplayTest, CpuTimeIsThePoliciesOwn) {
  const Trace trace = MakeTrace(4, {{0}, {1}, {2}});
  absl::Duration clock;
  SlowPolicy policy(&clock);
  const ReplayResult result =
      Replay(trace, policy, {.cpu_time = [&] { return clock += absl::Nanoseconds(7); }});
  EXPECT_EQ(result.policy_cpu, 3 * absl::Nanoseconds(1123)) << "without the clock's own 7";
}

// A guest with a hot set, a ring that is written through, and a save every 40 scans.
Trace SomeGuest(uint32_t seed) {
  std::mt19937 random(seed);
  Trace trace({4096, 100'000, 4096});
  for (uint32_t scan = 0; scan < 1200; ++scan) {
    PageBitmap written(4096);
    for (PageIndex page = 0; page < 60; ++page) {
      if (random() % 10 != 0) written.Set({page * 3, 1});
    }
    written.Set({1000 + scan % 50 * 20, 20});
    if (scan % 40 == 5) written.Set({2500, 300});
    for (int i = 0; i < 10; ++i) written.Set({3000 + static_cast<PageIndex>(random() % 900), 1});
    std::vector<PageRun> runs;
    written.AppendRunsWithin({0, 4096}, &runs);
    trace.AddScan(runs);
  }
  return trace;
}

TEST(ReplayTest, EveryPolicyThatPredictsHoldsTheSetPoint) {
  const Trace trace = SomeGuest(6);
  for (std::string_view name : {"learned", "ewma", "oldest", "skip-if-dirty"}) {
    for (PageCount set_point : {0, 100, 400}) {
      EXPECT_LE(ReplayOf(trace, name, set_point).residual_max_pages, set_point)
          << std::string(name);
    }
  }
}

TEST(ReplayTest, ReplaysAreBitIdentical) {
  const Trace trace = SomeGuest(6);
  for (std::string_view name : PolicyNames()) {
    const ReplayResult first = ReplayOf(trace, name, 250), second = ReplayOf(trace, name, 250);
    EXPECT_EQ(first.pages_sent, second.pages_sent) << std::string(name);
    EXPECT_EQ(first.write_faults, second.write_faults) << std::string(name);
    EXPECT_EQ(first.residual_mean_pages, second.residual_mean_pages) << std::string(name);
  }
}

// Each page is written, once more 3 scans later, and then not for 97 scans. After the second write
// its average gap is shortest, so "ewma" holds on to just the wrong pages.
TEST(LearnedPolicyTest, LearnsWhatAnAverageGapHides) {
  Trace trace({4096, 100'000, 4096});
  for (uint32_t scan = 0; scan < 1200; ++scan) {
    PageBitmap written(4096);
    written.Set({scan % 100 * 20, 20});
    written.Set({(scan + 97) % 100 * 20, 20});
    std::vector<PageRun> runs;
    written.AppendRunsWithin({0, 4096}, &runs);
    trace.AddScan(runs);
  }
  const uint64_t learned = ReplayOf(trace, "learned", 150).pages_sent;
  EXPECT_LT(learned * 100, ReplayOf(trace, "ewma", 150).pages_sent * 80);
  EXPECT_LT(learned * 100, RunOptimum(trace, 150).pages_sent * 115);
}

TEST(LearnedPolicyTest, IsNoWorseWhereTheSimpleOnesDoWell) {
  const Trace trace = SomeGuest(6);
  const uint64_t learned = ReplayOf(trace, "learned", 250).pages_sent;
  EXPECT_LT(learned * 100, ReplayOf(trace, "ewma", 250).pages_sent * 103);
  EXPECT_LT(learned * 100, ReplayOf(trace, "oldest", 250).pages_sent * 103);
}

TEST(LearnedPolicyTest, BackOffSavesMostFaultsAndCostsHardlyAByte) {
  const Trace trace = SomeGuest(6);
  const auto all_armed = MakePolicy("learned", 4096, {.max_back_off_log2 = 0}).value();
  const ReplayResult without = Replay(trace, *all_armed, {.set_point = 600});
  const ReplayResult with = ReplayOf(trace, "learned", 600);
  EXPECT_LE(with.write_faults * 10, without.write_faults * 6);
  EXPECT_LE(with.pages_sent * 100, without.pages_sent * 103);
}

// What a lost link makes stale again has to be found, though no scan reports it.
TEST(LearnedPolicyTest, FindsPagesThatBecameStaleWithoutAWrite) {
  const auto policy = MakePolicy("learned", 1000).value();
  std::vector<PageRun> chosen;
  for (int scan = 0; scan < 50; ++scan) {
    const std::vector<PageRun> written = {{static_cast<PageIndex>(scan * 3), 2}};
    policy->OnScan(written);
    policy->OnSent(written);
  }
  PageBitmap stale(1000);
  stale.Set({0, 100});
  policy->Choose(stale, 40, &chosen);
  EXPECT_EQ(CountPages(chosen), 40u);
  policy->Choose(stale, 99, &chosen);
  EXPECT_EQ(CountPages(chosen), 99u);
  for (const PageRun& run : chosen) EXPECT_EQ(stale.CountWithin(run), run.count);
}

}  // namespace
}  // namespace presync
