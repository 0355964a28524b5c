#include "predictor/order_contest.h"

#include "gtest/gtest.h"

namespace presync {
namespace {

constexpr PageCount kPages = 1000;

// 40 pages are written in every scan, and 20 others once and never again. `keeps_hot` is the rival
// that knows; the others let go the pages that are written all the time.
void Play(int scans, size_t keeps_hot, PageCount stale, OrderContest* contest) {
  OrderContest::Scores hot, cold;
  for (size_t rival = 0; rival < hot.size(); ++rival) {
    hot[rival] = rival == keeps_hot ? 1 : 200;
    cold[rival] = rival == keeps_hot ? 200 : 1;
  }
  PageIndex next_cold = kPages;
  for (int scan = 0; scan < scans; ++scan) {
    contest->SetSize(stale);
    for (PageIndex page = 0; page < 40; ++page) contest->OnWritten(page, hot);
    for (int i = 0; i < 20; ++i) contest->OnWritten(next_cold++, cold);
    contest->EndScan();
  }
}

TEST(OrderContestTest, TheRivalWithTheFewestResendsLeadsAndLosesItAgain) {
  OrderContest contest;
  Play(200, 2, 100, &contest);
  EXPECT_EQ(contest.leader(), 2u);
  Play(400, 0, 100, &contest);
  EXPECT_EQ(contest.leader(), 0u) << "it forgets";
}

TEST(OrderContestTest, ALargeSetIsPlayedOnASample) {
  OrderContest contest;
  contest.SetSize(1 << 20);
  PageCount held = 0;
  for (PageIndex page = 0; page < 1 << 20; ++page) {
    contest.OnWritten(page, {1, 1, 1});
    held += contest.Holds(page);
  }
  EXPECT_GT(held, 64u);
  EXPECT_LT(held, 512u);
}

TEST(OrderContestTest, EqualRivalsAndAnEmptySetChangeNothing) {
  OrderContest contest;
  const size_t leader = contest.leader();
  Play(200, OrderContest::kRivals, 100, &contest);
  EXPECT_EQ(contest.leader(), leader);
  Play(200, leader == 0 ? 1 : 0, 0, &contest);
  EXPECT_EQ(contest.leader(), leader);
  EXPECT_FALSE(contest.Holds(1));
}

TEST(OrderContestTest, AnAgedPageIsJudgedByItsNewScore) {
  OrderContest contest;
  contest.SetSize(100);
  for (PageIndex page = 0; page < 120; ++page) contest.OnWritten(page, {50, 50, 50});
  contest.OnAged(7, {90, 90, 90});
  contest.EndScan();
  EXPECT_FALSE(contest.Holds(7));
  EXPECT_TRUE(contest.Holds(0) || contest.Holds(1)) << "of equals the most stay";
  contest.OnAged(7, {10, 10, 10});
  EXPECT_FALSE(contest.Holds(7));
}

}  // namespace
}  // namespace presync
