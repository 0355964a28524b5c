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

}  // namespace
}  // namespace presync
