#include "predictor/bitmap.h"

#include <algorithm>
#include <optional>
#include <random>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace presync {
namespace {

using ::testing::ElementsAre;
using ::testing::IsEmpty;

std::vector<PageRun> AllRuns(const PageBitmap& bitmap, PageCount max_pages = UINT32_MAX) {
  std::vector<PageRun> runs;
  for (auto run = bitmap.NextRun(0, max_pages); run; run = bitmap.NextRun(run->end(), max_pages)) {
    runs.push_back(*run);
  }
  return runs;
}

TEST(PageBitmapTest, NoPagesAtAll) {
  PageBitmap bitmap(0, true);
  EXPECT_EQ(bitmap.count(), 0u);
  EXPECT_TRUE(bitmap.empty());
  EXPECT_EQ(bitmap.Set({0, 0}), 0u);
  bitmap.SetAll();
  EXPECT_TRUE(bitmap.empty());
  EXPECT_EQ(bitmap.NextRun(0), std::nullopt);
  EXPECT_EQ(bitmap.CountWithin({0, 0}), 0u);
  EXPECT_TRUE(bitmap == PageBitmap(0));
}

TEST(PageBitmapTest, OnePage) {
  PageBitmap bitmap(1);
  EXPECT_EQ(bitmap.NextRun(0), std::nullopt);
  EXPECT_EQ(bitmap.Set({0, 1}), 1u);
  EXPECT_EQ(bitmap.Set({0, 1}), 0u) << "set already";
  EXPECT_THAT(AllRuns(bitmap), ElementsAre(PageRun{0, 1}));
  EXPECT_TRUE(bitmap == PageBitmap(1, true));
  EXPECT_EQ(bitmap.Clear({0, 1}), 1u);
  EXPECT_TRUE(bitmap.empty());
}

TEST(PageBitmapTest, RunsCrossWordsAndEndAtAnOddSize) {
  PageBitmap bitmap(131);
  EXPECT_EQ(bitmap.Set({60, 71}), 71u);
  EXPECT_THAT(AllRuns(bitmap), ElementsAre(PageRun{60, 71}));
  EXPECT_EQ(bitmap.Clear({64, 64}), 64u);
  EXPECT_THAT(AllRuns(bitmap), ElementsAre(PageRun{60, 4}, PageRun{128, 3}));
  EXPECT_EQ(bitmap.CountWithin({63, 66}), 2u);
}

TEST(PageBitmapTest, NextRunIgnoresWhatIsBelowAndCutsWhatIsTooLong) {
  PageBitmap bitmap(300, true);
  EXPECT_EQ(bitmap.NextRun(100), (PageRun{100, 200}));
  EXPECT_EQ(bitmap.NextRun(100, 30), (PageRun{100, 30}));
  EXPECT_EQ(bitmap.NextRun(299, 30), (PageRun{299, 1}));
  EXPECT_EQ(bitmap.NextRun(300), std::nullopt);
  EXPECT_THAT(AllRuns(bitmap, 128),
              ElementsAre(PageRun{0, 128}, PageRun{128, 128}, PageRun{256, 44}));
}

TEST(PageBitmapTest, RunsWithinAreCutAtBothEnds) {
  PageBitmap bitmap(200);
  bitmap.Set({10, 20});
  bitmap.Set({70, 100});
  std::vector<PageRun> runs = {{1, 1}};
  bitmap.AppendRunsWithin({15, 85}, &runs);
  EXPECT_THAT(runs, ElementsAre(PageRun{1, 1}, PageRun{15, 15}, PageRun{70, 30}));
  runs.clear();
  bitmap.AppendRunsWithin({30, 40}, &runs);
  EXPECT_THAT(runs, IsEmpty());
}

TEST(PageBitmapDeathTest, RunsOutsideAreABug) {
  PageBitmap bitmap(100);
  EXPECT_DEATH(bitmap.Set({99, 2}), "check failed");
  EXPECT_DEATH(bitmap.Clear({101, 0}), "check failed");
  EXPECT_DEATH(bitmap.CountWithin({50, UINT32_MAX}), "check failed");
  EXPECT_DEATH(bitmap.Or(PageBitmap(101)), "check failed");
}

TEST(RunsTest, CountAndJoin) {
  std::vector<PageRun> runs;
  for (PageRun run : {PageRun{1, 2}, PageRun{3, 1}, PageRun{4, 0}, PageRun{5, 5}}) {
    AppendRun(run, &runs);
  }
  EXPECT_THAT(runs, ElementsAre(PageRun{1, 3}, PageRun{5, 5}));
  EXPECT_EQ(CountPages(runs), 8u);
  EXPECT_EQ(CountPages({}), 0u);
}

// The obvious implementation, to compare with.
struct NaiveBitmap {
  std::vector<bool> pages;

  PageCount Change(PageRun run, bool value) {
    PageCount changed = 0;
    for (PageIndex page = run.first; page < run.end(); ++page) {
      changed += pages[page] != value;
      pages[page] = value;
    }
    return changed;
  }

  std::vector<PageRun> RunsWithin(PageRun within, PageCount max_pages) const {
    std::vector<PageRun> runs;
    bool open = false;
    for (PageIndex page = within.first; page < within.end(); ++page) {
      if (!pages[page]) {
        open = false;
      } else if (open && runs.back().count < max_pages) {
        ++runs.back().count;
      } else {
        runs.push_back({page, 1});
        open = true;
      }
    }
    return runs;
  }
};

class PageBitmapPropertyTest : public ::testing::TestWithParam<PageCount> {
 protected:
  PageRun RandomRun() {
    const PageIndex first = Below(size_ + 1);
    PageCount count = Below(size_ - first + 1);
    if (Below(2) == 0) count = std::min<PageCount>(count, Below(9));
    return {first, count};
  }
  PageCount Below(PageCount limit) {
    return std::uniform_int_distribution<PageCount>(0, limit - 1)(random_);
  }

  void ExpectSame(const PageBitmap& bitmap, const NaiveBitmap& naive) {
    const PageRun all{0, size_};
    const PageRun part = RandomRun();
    const PageCount max_pages = 1 + Below(100);
    EXPECT_EQ(AllRuns(bitmap, max_pages), naive.RunsWithin(all, max_pages));
    std::vector<PageRun> within;
    bitmap.AppendRunsWithin(part, &within);
    EXPECT_EQ(within, naive.RunsWithin(part, UINT32_MAX));
    EXPECT_EQ(bitmap.CountWithin(part), CountPages(within));
    EXPECT_EQ(bitmap.count(), CountPages(naive.RunsWithin(all, UINT32_MAX)));
    for (PageIndex page = 0; page < size_; ++page) ASSERT_EQ(bitmap.Test(page), naive.pages[page]);
  }

  const PageCount size_ = GetParam();
  const uint32_t seed_ = 20260101 + GetParam();
  std::mt19937 random_{seed_};
};

TEST_P(PageBitmapPropertyTest, SameAsTheNaiveOne) {
  SCOPED_TRACE(testing::Message() << "seed " << seed_ << ", size " << size_);
  PageBitmap bitmap(size_), other(size_);
  NaiveBitmap naive{std::vector<bool>(size_)}, naive_other = naive;
  for (int step = 0; step < 300 && !HasFailure(); ++step) {
    const PageRun run = RandomRun();
    switch (Below(8)) {
      case 0:
      case 1:
        EXPECT_EQ(bitmap.Set(run), naive.Change(run, true));
        break;
      case 2:
      case 3:
        EXPECT_EQ(bitmap.Clear(run), naive.Change(run, false));
        break;
      case 4:
        EXPECT_EQ(other.Set(run), naive_other.Change(run, true));
        other.Clear({0, size_ / 3});
        naive_other.Change({0, size_ / 3}, false);
        break;
      case 5:
        bitmap.Or(other);
        for (PageIndex i = 0; i < size_; ++i) naive.pages[i] = naive.pages[i] || other.Test(i);
        break;
      case 6:
        bitmap.And(other);
        for (PageIndex i = 0; i < size_; ++i) naive.pages[i] = naive.pages[i] && other.Test(i);
        break;
      case 7:
        bitmap.AndNot(other);
        for (PageIndex i = 0; i < size_; ++i) naive.pages[i] = naive.pages[i] && !other.Test(i);
        break;
    }
    ExpectSame(bitmap, naive);
  }
}

INSTANTIATE_TEST_SUITE_P(Sizes, PageBitmapPropertyTest,
                         ::testing::Values(1, 2, 63, 64, 65, 127, 128, 1000));

}  // namespace
}  // namespace presync
