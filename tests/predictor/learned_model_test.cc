#include "predictor/learned_model.h"

#include "gtest/gtest.h"
#include "predictor/learned_page.h"

namespace presync {
namespace {

LearnedModel::Features PageOf(uint32_t gap_log2, uint32_t age_class, PageIndex page = 5000) {
  return {.page = page,
          .age_class = age_class,
          .gap_log2_quarters = 4 * gap_log2,
          .last_gap = 8,
          .writes = 3};
}

TEST(LearnedModelTest, KnowsNothingButGoesByGapAndAgeAtFirst) {
  const LearnedModel model;
  uint32_t last = 0;
  for (uint32_t gap_log2 = 0; gap_log2 <= 12; ++gap_log2) {
    const uint32_t score = model.Scores(LearnedModel::Locate(PageOf(gap_log2, 0)))[0];
    EXPECT_GE(score, last) << gap_log2;
    EXPECT_LT(score, LearnedModel::kScores);
    last = score;
  }
  EXPECT_GT(model.Scores(LearnedModel::Locate(PageOf(1, 9)))[0],
            model.Scores(LearnedModel::Locate(PageOf(1, 0)))[0]);
}

TEST(LearnedModelTest, LearnsWhatContradictsThePrior) {
  LearnedModel model;
  const auto rare = LearnedModel::Locate(PageOf(9, 3, 1000));
  const auto often = LearnedModel::Locate(PageOf(1, 3, 9000));
  ASSERT_GT(model.Scores(rare)[0], model.Scores(often)[0]);
  for (int i = 0; i < 40; ++i) {
    for (size_t h = 0; h < LearnedModel::kHorizons; ++h) {
      model.Learn(rare, h, true);
      model.Learn(often, h, false);
    }
  }
  EXPECT_LT(model.Scores(rare)[0], model.Scores(often)[0]);
}

TEST(LearnedModelTest, UnlearnsWhatNoLongerHolds) {
  LearnedModel model;
  const auto cells = LearnedModel::Locate(PageOf(4, 2));
  for (int i = 0; i < 2000; ++i) model.Learn(cells, 0, true);
  const uint32_t hot = model.Scores(cells)[0];
  for (int i = 0; i < 100; ++i) model.Learn(cells, 0, false);
  EXPECT_GT(model.Scores(cells)[0], hot);
}

TEST(LearnedPageTest, RemembersGapsStreaksAndRuns) {
  LearnedPage page;
  EXPECT_FALSE(page.written());
  page.OnWritten(10, 1);
  EXPECT_EQ(page.last_gap(), LearnedPage::kUnseen);
  EXPECT_EQ(page.gap_log2_quarters(), LearnedPage::kFirstGapLog2Quarters);
  page.OnWritten(18, 4);
  EXPECT_EQ(page.gap_log2_quarters(), 12u) << "8 scans";
  EXPECT_EQ(page.last_gap(), 10u) << "from 8 on, below 12";
  EXPECT_EQ(page.run_log4(), 1u);
  page.OnWritten(19, 300);
  page.OnWritten(20, 300);
  EXPECT_EQ(page.streak(), 2u);
  EXPECT_EQ(page.run_log4(), 3u);
  EXPECT_EQ(page.WaitScans(5), 3u);
  page.Wait();
  EXPECT_EQ(page.Age(22), 0u);
  EXPECT_TRUE(page.WaitEnds(23, 5));
  EXPECT_EQ(page.WaitScans(5, 31), 31u) << "two writes are expected by then";
  page.EndWait(23);
  EXPECT_EQ(page.Age(25), 2u);
  EXPECT_TRUE(page.stale());
  page.OnSent(25);
  EXPECT_FALSE(page.stale());
  page.OnWritten(30, 1);
  EXPECT_EQ(page.streak(), 0u);
  EXPECT_EQ(page.writes(), 3u) << "saturates";
}

TEST(LearnedPageTest, LongGapsSaturate) {
  LearnedPage page;
  page.OnWritten(1, 1);
  page.OnWritten(1 + LearnedPage::kMaxAge, 1);
  EXPECT_EQ(page.last_gap(), LearnedPage::kUnseen - 1);
  EXPECT_EQ(page.gap_log2_quarters(), 52u);
}

}  // namespace
}  // namespace presync
