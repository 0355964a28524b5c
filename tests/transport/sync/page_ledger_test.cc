#include "transport/sync/page_ledger.h"

#include <gtest/gtest.h>

#include <vector>

namespace presync {
namespace {

PageLedger SyncedLedger(PageCount pages) {
  PageLedger ledger(pages, /*target_is_zero=*/true);
  ledger.MarkSynced({0, pages});
  return ledger;
}

std::vector<PageRun> Nonzero(const PageLedger& ledger) {
  std::vector<PageRun> runs;
  ledger.AppendTargetNonzero({0, ledger.pages()}, &runs);
  return runs;
}

TEST(PageLedger, EveryPageIsStaleAtFirst) {
  const PageLedger ledger(100, /*target_is_zero=*/true);
  EXPECT_EQ(ledger.stale().count(), 100u);
  EXPECT_EQ(ledger.sendable().count(), 100u);
  EXPECT_EQ(ledger.residual(), 100u);
  EXPECT_TRUE(Nonzero(ledger).empty());
}

TEST(PageLedger, AWriteCountsOnlyOnceItsCommitIsConfirmed) {
  PageLedger ledger = SyncedLedger(10);
  const PageRun run = {2, 3};
  ledger.MarkStale({&run, 1});
  EXPECT_EQ(ledger.residual(), 3u);
  ledger.MarkInFlight(run);
  ledger.OnPosted(run);
  EXPECT_TRUE(ledger.stale().empty());
  EXPECT_EQ(ledger.residual(), 3u);
  ledger.OnCompleted({run, false});
  EXPECT_EQ(ledger.residual(), 3u) << "a completion says nothing of the target";
  ledger.OnCommitPosted(1);
  EXPECT_EQ(ledger.residual(), 3u);
  ledger.OnCommitted(1);
  EXPECT_TRUE(ledger.all_synced());
}

TEST(PageLedger, APageInFlightIsNotSendableAgainBeforeItCompletes) {
  PageLedger ledger = SyncedLedger(10);
  const PageRun run = {4, 2};
  ledger.MarkStale({&run, 1});
  ledger.MarkInFlight(run);
  ledger.OnPosted(run);
  ledger.MarkStale({&run, 1});  // written again while it flies
  EXPECT_EQ(ledger.stale().count(), 2u);
  EXPECT_TRUE(ledger.sendable().empty());
  ledger.OnCompleted({run, false});
  EXPECT_EQ(ledger.sendable().count(), 2u);
}

TEST(PageLedger, ACommitCoversOnlyWhatWasPostedBefore) {
  PageLedger ledger = SyncedLedger(10);
  const PageRun first = {0, 1};
  const PageRun second = {1, 1};
  ledger.MarkStale({&first, 1});
  ledger.MarkStale({&second, 1});
  ledger.MarkInFlight(first);
  ledger.OnPosted(first);
  ledger.OnCommitPosted(1);
  ledger.MarkInFlight(second);
  ledger.OnPosted(second);
  ledger.OnCompleted({first, false});
  ledger.OnCompleted({second, false});
  ledger.OnCommitted(1);
  EXPECT_EQ(ledger.residual(), 1u);
  EXPECT_TRUE(ledger.needs_commit());
}

TEST(PageLedger, ALostLinkMakesEverythingUnconfirmedStale) {
  PageLedger ledger = SyncedLedger(10);
  const PageRun confirmed = {0, 1}, committing = {1, 1}, completed = {2, 1}, flying = {3, 1};
  for (const PageRun& run : {confirmed, committing, completed, flying}) ledger.MarkStale({&run, 1});
  ledger.MarkInFlight(confirmed);
  ledger.OnPosted(confirmed);
  ledger.OnCompleted({confirmed, false});
  ledger.OnCommitPosted(1);
  ledger.OnCommitted(1);
  ledger.MarkInFlight(committing);
  ledger.OnPosted(committing);
  ledger.OnCompleted({committing, false});
  ledger.OnCommitPosted(2);
  ledger.MarkInFlight(completed);
  ledger.OnPosted(completed);
  ledger.OnCompleted({completed, false});
  ledger.MarkInFlight(flying);

  ledger.OnLinkLost();
  EXPECT_FALSE(ledger.stale().Test(0));
  EXPECT_EQ(ledger.stale().CountWithin({1, 3}), 3u);
  EXPECT_EQ(ledger.sendable(), ledger.stale());
  EXPECT_FALSE(ledger.commit_under_way());
}

TEST(PageLedger, AZeroWriteThatWasNotConfirmedMayNotHaveHappened) {
  PageLedger ledger(4, /*target_is_zero=*/false);
  ledger.MarkInFlight({0, 4});
  ledger.OnPosted({0, 4});
  ledger.OnCompleted({{0, 4}, /*zero=*/true});
  EXPECT_TRUE(Nonzero(ledger).empty());
  ledger.OnLinkLost();
  EXPECT_EQ(Nonzero(ledger), (std::vector<PageRun>{{0, 4}}));
}

TEST(PageLedger, TheFirstPassEndsWhenEveryPageWasSentOnce) {
  PageLedger ledger(4, /*target_is_zero=*/true);
  ledger.MarkInFlight({0, 2});
  ledger.OnPosted({0, 2});
  const PageRun again = {0, 1};
  ledger.MarkStale({&again, 1});  // written again: it was sent once all the same
  EXPECT_FALSE(ledger.first_pass_done());
  ledger.MarkSynced({2, 2});
  EXPECT_TRUE(ledger.first_pass_done());
  ledger.OnLinkLost();
  EXPECT_TRUE(ledger.first_pass_done());
  ledger.OnTargetReset(/*target_is_zero=*/true);
  EXPECT_FALSE(ledger.first_pass_done());
}

TEST(PageLedger, AResetTargetHoldsNothing) {
  PageLedger ledger = SyncedLedger(8);
  ledger.OnTargetReset(/*target_is_zero=*/true);
  EXPECT_EQ(ledger.stale().count(), 8u);
  EXPECT_TRUE(Nonzero(ledger).empty());
  ledger.OnTargetReset(/*target_is_zero=*/false);
  EXPECT_EQ(Nonzero(ledger), (std::vector<PageRun>{{0, 8}}));
}

using PageLedgerDeathTest = ::testing::Test;

TEST(PageLedgerDeathTest, SendingAPageTwiceAtATimeIsABrokenInvariant) {
  PageLedger ledger(4, true);
  ledger.MarkInFlight({0, 2});
  EXPECT_DEATH(ledger.MarkInFlight({1, 1}), "sendable_.Clear");
}

std::vector<PageRun> Touched(const PageLedger& ledger, PageRun run) {
  std::vector<PageRun> runs;
  ledger.AppendTouched(run, &runs);
  return runs;
}

TEST(PageLedger, WhatIsNotSyncedWhenAWatchBeginsIsTouched) {
  PageLedger ledger = SyncedLedger(20);
  const std::vector<PageRun> stale = {{1, 8}};
  ledger.MarkStale(stale);
  ledger.MarkInFlight({3, 6});
  ledger.OnPosted({5, 4});
  ledger.OnCompleted({{7, 2}, false});  // 1, 2 stale; 3, 4 in flight; 5, 6 posted; 7, 8 unconfirmed
  ledger.Watch({0, 10}, /*stale_may=*/false);
  EXPECT_EQ(Touched(ledger, {0, 10}), (std::vector<PageRun>{{1, 8}}));
  ledger.Watch({0, 10}, /*stale_may=*/true);
  EXPECT_EQ(Touched(ledger, {0, 10}), (std::vector<PageRun>{{3, 6}}));
}

TEST(PageLedger, WhatIsWrittenOrSentWhileItIsWatchedStaysTouchedThoughItIsSyncedAgain) {
  PageLedger ledger = SyncedLedger(20);
  ledger.Watch({0, 10}, false);
  EXPECT_TRUE(Touched(ledger, {0, 10}).empty());
  const PageRun written = {4, 2};
  ledger.MarkStale({&written, 1});
  ledger.MarkInFlight(written);
  ledger.OnPosted(written);
  ledger.OnCompleted({written, false});
  ledger.OnCommitPosted(1);
  ledger.OnCommitted(1);
  ASSERT_TRUE(ledger.all_synced());
  EXPECT_EQ(Touched(ledger, {0, 10}), std::vector<PageRun>{written});
  ledger.Watch({4, 1}, false);
  EXPECT_EQ(Touched(ledger, {0, 10}), (std::vector<PageRun>{{5, 1}}));
}

TEST(PageLedger, WhatLeftMemoryIsStaleWhereTheTargetIsNotZeroAndTouchedOnlyIfItWasNot) {
  PageLedger ledger(20, /*target_is_zero=*/false);
  ledger.MarkSynced({0, 10});
  ledger.MarkTargetZero({4, 2});
  ledger.Watch({0, 20}, /*stale_may=*/true);
  const std::vector<PageRun> holes = {{2, 6}, {9, 4}};
  ledger.MarkDiscarded(holes);
  EXPECT_EQ(Touched(ledger, {0, 20}), (std::vector<PageRun>{{2, 2}, {6, 2}, {9, 1}}));
  EXPECT_EQ(ledger.stale().count(), 10u + 5u);
}

TEST(PageLedger, APageThatIsDistrustedIsSentEvenAsZero) {
  PageLedger ledger = SyncedLedger(10);
  ASSERT_TRUE(Nonzero(ledger).empty());
  const std::vector<PageRun> runs = {{2, 3}};
  ledger.Distrust(runs);
  EXPECT_EQ(ledger.sendable().count(), 3u);
  EXPECT_EQ(Nonzero(ledger), runs);
  ledger.MarkTargetZero({3, 1});
  EXPECT_EQ(Nonzero(ledger), (std::vector<PageRun>{{2, 1}, {4, 1}}));
}

}  // namespace
}  // namespace presync
