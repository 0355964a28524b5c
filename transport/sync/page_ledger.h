// The ledger: what the source knows of each page's copy on the target. Pure bookkeeping; it is
// where the invariants "unarmed means stale" and "one write in flight a page" live
// (docs/design.md).
#pragma once

#include <optional>
#include <vector>

#include "absl/types/span.h"
#include "predictor/bitmap.h"
#include "predictor/page.h"
#include "transport/link.h"

namespace presync {

// A page is in one of these states, plus "in flight" beside any of them:
//   stale        the target may not hold its bytes; it has to be sent
//   unconfirmed  its bytes were written by the link, the target has not confirmed them yet
//   synced       the target holds its bytes
// Not thread-safe. Seven bits a page, eight once any was watched.
class PageLedger {
 public:
  // At first every page is stale. `target_is_zero`: the target's memory is fresh, so a page that
  // was never sent is zero there.
  PageLedger(PageCount pages, bool target_is_zero);

  // The pages were written by the guest, or are not watched any more.
  void MarkStale(absl::Span<const PageRun> runs);

  // `run` was armed and is about to be read for the link: it stops being stale, and can't be sent
  // again until it lands. Precondition: the whole run is sendable.
  void MarkInFlight(PageRun run);

  // A write that was in flight was accepted by the link: the next commit covers it.
  void OnPosted(PageRun run);

  // The link is done with a write that was posted.
  void OnCompleted(const PageWrite& write);

  // `run` was armed and found to be zero, as it is on the target already: synced without a write.
  // Precondition: no page of it is in flight.
  void MarkSynced(PageRun run);

  // A commit over everything posted so far was posted. One at a time may be under way.
  void OnCommitPosted(CommitId id);
  bool commit_under_way() const { return commit_under_way_ != 0; }
  // Whether something was posted that no commit covers yet.
  bool needs_commit() const { return !since_commit_.empty(); }
  // The link's newest confirmed commit.
  void OnCommitted(CommitId id);

  // The link died: everything that was not confirmed is stale, nothing is in flight.
  void OnLinkLost();

  // The target lost the memory: every page is stale.
  void OnTargetReset(bool target_is_zero);

  // --- For whoever compares the two copies while the guest runs ---
  // Begins anew to note which pages of `run` are *touched*: a page is, once the guest was seen to
  // write it or a link was given it; and at once if it is not synced. A page that is compared equal
  // or not, and was not touched by the end of it, was the same page all the time.
  // `stale_may`: pages that are only stale, and not with the link, do not count as touched.
  void Watch(PageRun run, bool stale_may);
  // The touched parts of `run`. Precondition: all of it is watched.
  void AppendTouched(PageRun run, std::vector<PageRun>* out) const;

  // The target's copy of these pages is not what it should be: they have to be sent, zeros too.
  void Distrust(absl::Span<const PageRun> runs);
  // The target's copy of `run` is known to be zero.
  void MarkTargetZero(PageRun run) { target_nonzero_.Clear(run); }

  PageCount pages() const { return stale_.size(); }
  const PageBitmap& stale() const { return stale_; }
  // Stale and not in flight: what may be sent now.
  const PageBitmap& sendable() const { return sendable_; }
  PageCount in_flight() const { return in_flight_.count(); }
  // What a launch would still have to wait for: stale, in flight or unconfirmed.
  PageCount residual() const;
  // Whether every page has been sent, or was found synced, since the target's memory was last
  // empty.
  bool first_pass_done() const { return never_sent_.empty(); }
  // Whether every page is synced.
  bool all_synced() const { return residual() == 0; }

  // Adds to `*pages` those that the link was given and the target has not confirmed.
  void AddUnconfirmed(PageBitmap* pages) const;

  // These pages have left the guest's memory, and so became zero: those whose copy may differ from
  // zero are stale.
  void MarkDiscarded(absl::Span<const PageRun> holes);

  // The parts of `run` whose copy on the target may differ from zero.
  void AppendTargetNonzero(PageRun run, std::vector<PageRun>* out) const {
    target_nonzero_.AppendRunsWithin(run, out);
  }

 private:
  PageBitmap stale_;
  PageBitmap sendable_;
  PageBitmap in_flight_;
  PageBitmap since_commit_;  // posted, and not covered by any commit
  PageBitmap in_commit_;     // covered by the commit that is under way
  PageBitmap target_nonzero_;
  PageBitmap never_sent_;
  std::optional<PageBitmap> touched_;  // see Watch
  CommitId commit_under_way_ = 0;
};

}  // namespace presync
