#include "predictor/order_contest.h"

#include "gtest/gtest.h"

namespace presync {
namespace {

constexpr PageCount kPages = 1000;

// 40 pages are written in every fourth scan, and in each 20 others once and never again, which are
// not watched. `keeps_hot` is the rival that knows; the others let go the pages that are written
// all the time, and so does the one by age, for those that are not watched look younger.
void Play(int scans, size_t keeps_hot, PageCount stale, OrderContest* contest) {
  OrderContest::Scores hot, cold;
  for (size_t rival = 0; rival < hot.size(); ++rival) {
    hot[rival] = rival == keeps_hot ? 1 : 200;
    cold[rival] = rival == keeps_hot ? 200 : 1;
  }
  PageIndex next_cold = kPages;
  for (int scan = 0; scan < scans; ++scan) {
    contest->SetSize(stale);
    for (PageIndex page = 0; page < 40 && scan % 4 == 0; ++page) {
      contest->OnWritten(page, hot, false);
    }
    for (int i = 0; i < 20; ++i) contest->OnWritten(next_cold++, cold, true);
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
    contest.OnWritten(page, {}, false);
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

OrderContest::Scores Alike(uint16_t score) {
  OrderContest::Scores scores;
  scores.fill(score);
  return scores;
}

TEST(OrderContestTest, AnAgedPageIsJudgedByItsNewScore) {
  OrderContest contest;
  contest.SetSize(100);
  contest.OnWritten(7, Alike(50), false);
  contest.EndScan();
  for (PageIndex page = 8; page < 128; ++page) contest.OnWritten(page, Alike(50), false);
  contest.OnAged(7, Alike(90));
  contest.EndScan();
  EXPECT_FALSE(contest.Holds(7)) << "it is the oldest, too";
  EXPECT_TRUE(contest.Holds(8) || contest.Holds(9)) << "of equals the most stay";
  contest.OnAged(7, Alike(10));
  EXPECT_FALSE(contest.Holds(7));
}

TEST(OrderContestTest, WhoeverGoesByAgeKeepsAPageThatWaitsUntilItIsWatched) {
  OrderContest contest;
  contest.SetSize(100);
  PageIndex next = 1000;
  const auto write = [&](int pages) {
    for (int i = 0; i < pages; ++i) contest.OnWritten(next++, Alike(50), false);
    contest.EndScan();
  };
  contest.OnWritten(7, Alike(90), true);  // the others let it go first
  for (int scan = 0; scan < 20; ++scan) write(20);
  EXPECT_TRUE(contest.Holds(7));
  contest.OnWatched(7);
  for (int scan = 0; scan < 20; ++scan) write(20);
  EXPECT_FALSE(contest.Holds(7));
}

}  // namespace
}  // namespace presync
