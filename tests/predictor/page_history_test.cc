#include "predictor/page_history.h"

#include <algorithm>
#include <cmath>

#include "gtest/gtest.h"

namespace presync {
namespace {

TEST(Log2SixteenthsTest, ExactAtPowersOfTwoNearElsewhereAndMonotone) {
  for (uint32_t exponent = 0; exponent < 16; ++exponent) {
    EXPECT_EQ(Log2Sixteenths(1u << exponent), exponent * 16);
  }
  for (uint32_t x = 2; x < 1 << 15; ++x) {
    ASSERT_GE(Log2Sixteenths(x), Log2Sixteenths(x - 1)) << x;
    ASSERT_NEAR(Log2Sixteenths(x), 16 * std::log2(x), 2.4) << x;  // 1.4, and 1 for the cut fraction
  }
}

TEST(PageHistoryTest, NewPagesWereNeverWritten) {
  PageHistory page;
  EXPECT_FALSE(page.written());
  EXPECT_FALSE(page.waiting());
  EXPECT_EQ(page.streak(), 0u);
}

TEST(PageHistoryTest, TheFirstGapCountsFromTheSending) {
  PageHistory page;
  page.OnSent(100);
  page.OnWritten(108);
  EXPECT_TRUE(page.written());
  EXPECT_EQ(page.gap_log2_sixteenths(), 3 * 16u);
  EXPECT_EQ(page.Age(110), 2u);

  PageHistory late;
  late.OnSent(100);
  late.OnWritten(5000);
  EXPECT_EQ(late.gap_log2_sixteenths(), 7 * 16u) << "a first gap counts as at most 128 scans";
}

TEST(PageHistoryTest, TheAverageMovesByAQuarterAndArrives) {
  PageHistory page;
  page.OnSent(0);
  page.OnWritten(16);  // 64 sixteenths
  page.OnWritten(17);  // a gap of 1: 64 - 64 / 4
  EXPECT_EQ(page.gap_log2_sixteenths(), 48u);
  for (uint32_t now = 18; now < 40; ++now) page.OnWritten(now);
  EXPECT_EQ(page.gap_log2_sixteenths(), 0u);
  for (uint32_t now = 40; now < 40 + 30 * 8; now += 8) page.OnWritten(now + 8 - 1);
  EXPECT_EQ(page.gap_log2_sixteenths(), 48u);
}

TEST(PageHistoryTest, SendingAWrittenPageDoesNotMakeItYounger) {
  PageHistory page;
  page.OnWritten(10);
  page.OnSent(50);
  EXPECT_EQ(page.Age(60), 50u);
}

TEST(PageHistoryTest, StreaksCountScansInARowAndEndWithAGap) {
  PageHistory page;
  page.OnWritten(10);
  EXPECT_EQ(page.streak(), 0u);
  for (uint32_t i = 1; i <= 9; ++i) {
    page.OnWritten(10 + i);
    EXPECT_EQ(page.streak(), std::min(i, PageHistory::kMaxStreak));
  }
  EXPECT_EQ(page.WaitScans(5), 31u);
  EXPECT_EQ(page.WaitScans(2), 3u);
  EXPECT_EQ(page.WaitScans(0), 0u);
  page.OnWritten(21);
  EXPECT_EQ(page.streak(), 0u);
}

TEST(PageHistoryTest, AWaitCountsAsWrittenInEachScan) {
  PageHistory page;
  page.OnSent(0);
  page.OnWritten(64);  // 96 sixteenths
  page.OnWritten(65);  // 72
  page.OnWritten(66);  // 54, streak 2: waits 3 scans
  page.Wait();
  EXPECT_EQ(page.Age(68), 0u);
  EXPECT_FALSE(page.WaitEnds(68, 5));
  ASSERT_TRUE(page.WaitEnds(69, 5));
  page.EndWait(69);  // 54 -> 40 -> 30 -> 22
  EXPECT_EQ(page.gap_log2_sixteenths(), 22u);
  EXPECT_EQ(page.Age(70), 1u) << "it ages from the end of the wait";
  page.OnWritten(70);
  EXPECT_EQ(page.streak(), 3u) << "the wait did not break the streak";
}

TEST(PageHistoryTest, SendingEndsAWait) {
  PageHistory page;
  page.OnWritten(1);
  page.OnWritten(2);
  page.OnWritten(3);
  page.Wait();
  page.OnSent(5);
  EXPECT_FALSE(page.waiting());
  EXPECT_EQ(page.Age(6), 1u);
  EXPECT_FALSE(page.WaitEnds(6, 5));
}

TEST(PageHistoryTest, StampsSaturateBeforeTheyWrap) {
  PageHistory swept, forgotten;
  swept.OnWritten(5);
  forgotten.OnWritten(5);
  for (uint32_t now = 5; now < 40'000; now += 4096) swept.Saturate(now);
  EXPECT_EQ(swept.Age(40'000), PageHistory::kMaxAge);
  EXPECT_EQ(forgotten.Age(5 + (1 << 14) + 3), 3u) << "this is what the sweep is for";
}

}  // namespace
}  // namespace presync
