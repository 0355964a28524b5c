#include "transport/sync/page_ledger.h"

#include <utility>

#include "predictor/check.h"

namespace presync {

PageLedger::PageLedger(PageCount pages, bool target_is_zero)
    : stale_(pages, true),
      sendable_(pages, true),
      in_flight_(pages),
      since_commit_(pages),
      in_commit_(pages),
      target_nonzero_(pages, !target_is_zero),
      never_sent_(pages, true) {}

void PageLedger::MarkStale(absl::Span<const PageRun> runs) {
  std::vector<PageRun> flying;
  for (const PageRun& run : runs) {
    stale_.Set(run);
    sendable_.Set(run);
    in_flight_.AppendRunsWithin(run, &flying);
    if (touched_) touched_->Set(run);
  }
  for (const PageRun& run : flying) sendable_.Clear(run);
}

void PageLedger::MarkInFlight(PageRun run) {
  PRESYNC_CHECK(sendable_.Clear(run) == run.count);
  stale_.Clear(run);
  in_flight_.Set(run);
  target_nonzero_.Set(run);
  never_sent_.Clear(run);
  if (touched_) touched_->Set(run);
}

void PageLedger::OnPosted(PageRun run) { since_commit_.Set(run); }

void PageLedger::OnCompleted(const PageWrite& write) {
  PRESYNC_CHECK(in_flight_.Clear(write.run) == write.run.count);
  if (write.zero) target_nonzero_.Clear(write.run);
  std::vector<PageRun> stale_again;
  stale_.AppendRunsWithin(write.run, &stale_again);
  for (const PageRun& run : stale_again) sendable_.Set(run);
}

void PageLedger::MarkSynced(PageRun run) {
  PRESYNC_CHECK(in_flight_.CountWithin(run) == 0);
  stale_.Clear(run);
  sendable_.Clear(run);
  never_sent_.Clear(run);
}

void PageLedger::OnCommitPosted(CommitId id) {
  PRESYNC_CHECK(commit_under_way_ == 0);
  commit_under_way_ = id;
  std::swap(in_commit_, since_commit_);
}

void PageLedger::OnCommitted(CommitId id) {
  if (commit_under_way_ == 0 || id < commit_under_way_) return;
  commit_under_way_ = 0;
  in_commit_.ClearAll();
}

void PageLedger::OnLinkLost() {
  AddUnconfirmed(&stale_);
  // A zero write that was not confirmed may have happened or not.
  AddUnconfirmed(&target_nonzero_);
  in_flight_.ClearAll();
  since_commit_.ClearAll();
  in_commit_.ClearAll();
  commit_under_way_ = 0;
  sendable_ = stale_;
}

void PageLedger::OnTargetReset(bool target_is_zero) {
  OnLinkLost();
  stale_.SetAll();
  sendable_.SetAll();
  never_sent_.SetAll();
  if (touched_) touched_->SetAll();
  target_is_zero ? target_nonzero_.ClearAll() : target_nonzero_.SetAll();
}

void PageLedger::Watch(PageRun run, bool stale_may) {
  if (!touched_) touched_.emplace(pages());
  touched_->Clear(run);
  std::vector<PageRun> not_synced;
  if (!stale_may) stale_.AppendRunsWithin(run, &not_synced);
  for (const PageBitmap* with_link : {&in_flight_, &since_commit_, &in_commit_}) {
    with_link->AppendRunsWithin(run, &not_synced);
  }
  for (const PageRun& each : not_synced) touched_->Set(each);
}

void PageLedger::AppendTouched(PageRun run, std::vector<PageRun>* out) const {
  PRESYNC_CHECK(touched_.has_value());
  touched_->AppendRunsWithin(run, out);
}

// What is stale already is not marked again: it would count as touched.
void PageLedger::MarkDiscarded(absl::Span<const PageRun> holes) {
  std::vector<PageRun> nonzero, stale, newly;
  for (const PageRun& hole : holes) target_nonzero_.AppendRunsWithin(hole, &nonzero);
  for (const PageRun& run : nonzero) {
    stale.clear();
    stale_.AppendRunsWithin(run, &stale);
    PageIndex next = run.first;
    for (const PageRun& known : stale) {
      AppendRun({next, known.first - next}, &newly);
      next = known.end();
    }
    AppendRun({next, run.end() - next}, &newly);
  }
  MarkStale(newly);
}

void PageLedger::Distrust(absl::Span<const PageRun> runs) {
  for (const PageRun& run : runs) target_nonzero_.Set(run);
  MarkStale(runs);
}

void PageLedger::AddUnconfirmed(PageBitmap* pages) const {
  pages->Or(in_flight_);
  pages->Or(since_commit_);
  pages->Or(in_commit_);
}

PageCount PageLedger::residual() const {
  PageBitmap waiting = stale_;
  AddUnconfirmed(&waiting);
  return waiting.count();
}

}  // namespace presync
