#include "predictor/policy.h"

#include <algorithm>
#include <memory>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace presync {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;

std::unique_ptr<SendPolicy> Make(std::string_view name, PageCount pages) {
  auto policy = MakePolicy(name, pages);
  EXPECT_TRUE(policy.ok()) << policy.status();
  return *std::move(policy);
}

std::vector<PageRun> Choose(SendPolicy& policy, const PageBitmap& candidates, PageCount pages) {
  std::vector<PageRun> chosen = {{999, 1}};  // must be replaced
  policy.Choose(candidates, pages, &chosen);
  return chosen;
}

void Scans(SendPolicy& policy, int scans) {
  for (int i = 0; i < scans; ++i) policy.OnScan({});
}

PageBitmap Set(PageCount size, std::vector<PageRun> runs) {
  PageBitmap set(size);
  for (const PageRun& run : runs) set.Set(run);
  return set;
}

TEST(MakePolicyTest, KnowsItsNamesAndRefusesOthers) {
  EXPECT_THAT(PolicyNames(), ElementsAre("learned", "ewma", "oldest", "skip-if-dirty",
                                         "once-a-second", "every-scan"));
  for (std::string_view name : PolicyNames()) EXPECT_EQ(Make(name, 10)->name(), name);
  const auto unknown = MakePolicy("lru", 10);
  EXPECT_EQ(unknown.status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(unknown.status().message()),
              ::testing::AllOf(
                  HasSubstr("lru"),
                  HasSubstr("learned, ewma, oldest, skip-if-dirty, once-a-second, every-scan")));
  EXPECT_EQ(MakePolicy("once-a-second", 10, {.scans_per_second = 0}).status().code(),
            absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(MakePolicy("ewma", 10, {.max_back_off_log2 = 6}).status().code(),
            absl::StatusCode::kInvalidArgument);
}

class AnyPolicyTest : public ::testing::TestWithParam<std::string_view> {};

TEST_P(AnyPolicyTest, EmptyAndTinyGuests) {
  auto none = Make(GetParam(), 0);
  Scans(*none, 3);
  EXPECT_THAT(Choose(*none, PageBitmap(0), 5), IsEmpty());

  auto one = Make(GetParam(), 1);
  const std::vector<PageRun> page = {{0, 1}};
  one->OnSent(page);
  one->OnScan(page);
  EXPECT_THAT(Choose(*one, PageBitmap(1, true), 0), IsEmpty());
  EXPECT_THAT(Choose(*one, PageBitmap(1, true), 5), ElementsAre(PageRun{0, 1}));
  EXPECT_THAT(Choose(*one, PageBitmap(1), 5), IsEmpty());
}

TEST_P(AnyPolicyTest, TheBulkPhaseGoesInLongRunsByAddress) {
  auto policy = Make(GetParam(), 1000);
  EXPECT_THAT(Choose(*policy, PageBitmap(1000, true), 300), ElementsAre(PageRun{0, 300}));
  EXPECT_THAT(Choose(*policy, Set(1000, {{10, 20}, {500, 90}}), 50),
              ElementsAre(PageRun{10, 20}, PageRun{500, 30}));
}

TEST_P(AnyPolicyTest, ChoosingTwiceGivesTheSame) {
  auto policy = Make(GetParam(), 100);
  const std::vector<PageRun> written = {{3, 4}, {50, 1}};
  policy->OnSent(written);
  policy->OnScan(written);
  const PageBitmap stale = Set(100, {{0, 10}, {45, 10}});
  const auto first = Choose(*policy, stale, 7);
  EXPECT_EQ(CountPages(first), 7u);
  EXPECT_EQ(Choose(*policy, stale, 7), first);
}

TEST_P(AnyPolicyTest, SameCallsSameAnswersAndOnlyCandidatesAscending) {
  constexpr PageCount kPages = 777;
  constexpr uint32_t kSeed = 5;
  SCOPED_TRACE(testing::Message() << "seed " << kSeed);
  auto policy = Make(GetParam(), kPages), twin = Make(GetParam(), kPages);
  std::mt19937 random(kSeed);
  for (int scan = 0; scan < 400; ++scan) {
    PageBitmap written_set(kPages), stale(kPages);
    for (PageIndex page = 0; page < kPages; ++page) {
      if (random() % (1 + page / 8) == 0) written_set.Set({page, 1});
      if (random() % 3 == 0) stale.Set({page, 1});
    }
    std::vector<PageRun> written, arm, twin_arm;
    written_set.AppendRunsWithin({0, kPages}, &written);
    policy->OnScan(written);
    twin->OnScan(written);
    policy->AppendPagesToArm(&arm);
    twin->AppendPagesToArm(&twin_arm);
    ASSERT_EQ(arm, twin_arm);
    const PageCount wanted = random() % 300;
    const auto chosen = Choose(*policy, stale, wanted);
    ASSERT_EQ(chosen, Choose(*twin, stale, wanted));
    ASSERT_EQ(CountPages(chosen), std::min(wanted, stale.count()));
    for (size_t i = 0; i < chosen.size(); ++i) {
      ASSERT_EQ(stale.CountWithin(chosen[i]), chosen[i].count);
      if (i == 0) continue;
      ASSERT_GT(chosen[i].first, chosen[i - 1].end()) << "not maximal";
    }
    policy->OnSent(chosen);
    twin->OnSent(chosen);
  }
}

INSTANTIATE_TEST_SUITE_P(All, AnyPolicyTest, ::testing::ValuesIn(PolicyNames()),
                         [](const auto& policy) {
                           std::string name(policy.param);
                           std::replace(name.begin(), name.end(), '-', '_');
                           return name;
                         });

TEST(EveryScanPolicyTest, ArmsNothingOfItsOwn) {
  auto policy = Make("every-scan", 10);
  const std::vector<PageRun> written = {{2, 3}};
  policy->OnSent(written);
  policy->OnScan(written);
  std::vector<PageRun> arm;
  policy->AppendPagesToArm(&arm);
  EXPECT_THAT(arm, IsEmpty());
}

TEST(EveryScanPolicyTest, WantsAllInEveryScanAndTheOtherOnceASecond) {
  auto every_scan = Make("every-scan", 10), once_a_second = Make("once-a-second", 10);
  for (int scan = 1; scan <= 30; ++scan) {
    Scans(*every_scan, 1);
    Scans(*once_a_second, 1);
    EXPECT_EQ(every_scan->Goal(7), 0u);
    EXPECT_EQ(once_a_second->Goal(7), scan % 10 == 0 ? 0 : UINT32_MAX) << scan;
  }
}

TEST(SkipIfDirtyPolicyTest, WhatWasJustWrittenComesLast) {
  auto policy = Make("skip-if-dirty", 10);
  const std::vector<PageRun> written = {{0, 2}, {5, 1}};
  policy->OnScan(written);
  std::vector<PageRun> arm;
  policy->AppendPagesToArm(&arm);
  EXPECT_EQ(arm, written) << "it has to see whether they are written again";
  const PageBitmap stale = Set(10, {{0, 8}});
  EXPECT_THAT(Choose(*policy, stale, 4), ElementsAre(PageRun{2, 3}, PageRun{6, 1}));
  EXPECT_THAT(Choose(*policy, stale, 6), ElementsAre(PageRun{0, 1}, PageRun{2, 3}, PageRun{6, 2}));
  Scans(*policy, 1);
  EXPECT_THAT(Choose(*policy, stale, 4), ElementsAre(PageRun{0, 4}));
}

// Pages 0, 1 and 2 are written in scans 1, 2 and 3.
TEST(OldestPolicyTest, OldestFirstThenByAddress) {
  auto policy = Make("oldest", 10);
  for (PageIndex page = 0; page < 3; ++page) policy->OnScan(std::vector<PageRun>{{page, 1}});
  Scans(*policy, 10);
  const PageBitmap stale = Set(10, {{0, 3}, {7, 1}});
  EXPECT_THAT(Choose(*policy, stale, 1), ElementsAre(PageRun{7, 1})) << "never written";
  EXPECT_THAT(Choose(*policy, stale, 2), ElementsAre(PageRun{0, 1}, PageRun{7, 1}));
  EXPECT_THAT(Choose(*policy, stale, 3), ElementsAre(PageRun{0, 2}, PageRun{7, 1}));
  policy->OnScan(std::vector<PageRun>{{0, 1}});
  EXPECT_THAT(Choose(*policy, stale, 2), ElementsAre(PageRun{1, 1}, PageRun{7, 1}));
}

// The obvious implementation: sort by the scan of the last write, 0 = never, then by address.
TEST(OldestPolicyTest, SameAsSorting) {
  constexpr PageCount kPages = 500;
  constexpr uint32_t kSeed = 3;
  auto policy = MakePolicy("oldest", kPages, {.max_back_off_log2 = 0}).value();
  std::mt19937 random(kSeed);
  std::vector<int> last_write(kPages, 0);
  for (int scan = 1; scan <= 300; ++scan) {
    SCOPED_TRACE(testing::Message() << "seed " << kSeed << ", scan " << scan);
    std::vector<PageRun> written;
    std::vector<PageIndex> order;
    PageBitmap stale(kPages);
    for (PageIndex page = 0; page < kPages; ++page) {
      if (random() % (5 + page) == 0) {
        AppendRun({page, 1}, &written);
        last_write[page] = scan;
      }
      if (random() % 2 == 0) {
        stale.Set({page, 1});
        order.push_back(page);
      }
    }
    policy->OnScan(written);
    std::stable_sort(order.begin(), order.end(),
                     [&](PageIndex a, PageIndex b) { return last_write[a] < last_write[b]; });
    order.resize(std::min<size_t>(order.size(), random() % kPages));
    PageBitmap expected(kPages);
    for (PageIndex page : order) expected.Set({page, 1});
    std::vector<PageRun> expected_runs;
    expected.AppendRunsWithin({0, kPages}, &expected_runs);
    ASSERT_EQ(Choose(*policy, stale, static_cast<PageCount>(order.size())), expected_runs);
  }
}

TEST(OldestPolicyTest, AgesDoNotWrap) {
  // 2^14 + 5 scans after it was written, page 4's 14-bit stamp looks 5 scans old unless it was
  // swept.
  for (PageCount size : {PageCount{6}, PageCount{9001}}) {
    auto policy = Make("oldest", size);
    policy->OnScan(std::vector<PageRun>{{4, 1}});
    Scans(*policy, (1 << 14) + 5 - 100);
    policy->OnScan(std::vector<PageRun>{{2, 1}});
    Scans(*policy, 99);
    EXPECT_THAT(Choose(*policy, Set(size, {{2, 1}, {4, 1}}), 1), ElementsAre(PageRun{4, 1}));
  }
}

// Page 1 is written every 4 scans, page 5 every 16; then both at once.
TEST(EwmaPolicyTest, TheLongerGapGoesFirstThoughItIsNoOlder) {
  auto policy = Make("ewma", 8);
  policy->OnSent(std::vector<PageRun>{{0, 8}});
  for (int scan = 1; scan <= 160; ++scan) {
    std::vector<PageRun> written;
    if (scan % 4 == 0) written.push_back({1, 1});
    if (scan % 16 == 0) written.push_back({5, 1});
    policy->OnScan(written);
  }
  const PageBitmap stale = Set(8, {{1, 1}, {5, 1}});
  EXPECT_THAT(Choose(*policy, stale, 1), ElementsAre(PageRun{5, 1}));
  // "oldest" can't tell them apart and goes by address.
  auto oldest = Make("oldest", 8);
  oldest->OnScan(std::vector<PageRun>{{1, 1}, {5, 1}});
  EXPECT_THAT(Choose(*oldest, stale, 1), ElementsAre(PageRun{1, 1}));
}

// The same, but page 1 stops: after 32 silent scans its age says more than its history.
TEST(EwmaPolicyTest, AgeOverrulesAShortHistory) {
  auto policy = Make("ewma", 8);
  policy->OnSent(std::vector<PageRun>{{0, 8}});
  for (int scan = 1; scan <= 192; ++scan) {
    std::vector<PageRun> written;
    if (scan % 4 == 0 && scan <= 160) written.push_back({1, 1});
    if (scan % 16 == 0) written.push_back({5, 1});
    policy->OnScan(written);
    const PageIndex expected = scan == 192 ? 1 : 5;
    if (scan == 160 || scan == 170 || scan == 192) {
      EXPECT_THAT(Choose(*policy, Set(8, {{1, 1}, {5, 1}}), 1), ElementsAre(PageRun{expected, 1}))
          << "scan " << scan;
    }
  }
}

TEST(EwmaPolicyTest, NeverWrittenIsBestAndEqualScoresGoByAddress) {
  auto policy = Make("ewma", 300);
  policy->OnSent(std::vector<PageRun>{{0, 300}});
  policy->OnScan(std::vector<PageRun>{{100, 100}});
  Scans(*policy, 9000);
  const PageBitmap stale(300, true);
  EXPECT_THAT(Choose(*policy, stale, 200), ElementsAre(PageRun{0, 100}, PageRun{200, 100}));
  EXPECT_THAT(Choose(*policy, stale, 250), ElementsAre(PageRun{0, 150}, PageRun{200, 100}));
}

}  // namespace
}  // namespace presync
