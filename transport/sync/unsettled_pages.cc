#include "transport/sync/unsettled_pages.h"

#include <algorithm>
#include <vector>

namespace presync {
namespace {

// A request is given twice the time that the longest of late has taken.
constexpr int kMargin = 2;
// Where requests take longer than this nothing is presumed, until they do not any more.
constexpr absl::Duration kMostPatience = absl::Minutes(2);

}  // namespace

UnsettledPages::UnsettledPages(PageCount pages, absl::Duration patience)
    : patience_(patience), young_(pages), ripening_(pages), ripe_(pages), presumed_(pages) {
  longest_.fill(absl::ZeroDuration());
}

void UnsettledPages::OnRead(PageRun run) {
  Forget(run);
  young_.Set(run);
}

void UnsettledPages::Forget(PageRun run) {
  for (PageBitmap* pages : {&young_, &ripening_, &ripe_, &presumed_}) {
    if (!pages->empty()) pages->Clear(run);
  }
}

absl::Duration UnsettledPages::Patience() const {
  const absl::Duration longest = *std::max_element(longest_.begin(), longest_.end());
  const absl::Duration patience = std::max(kMargin * longest, patience_);
  return patience <= kMostPatience ? patience : absl::InfiniteDuration();
}

// A request was in flight for longer than pages were left alone: it may have been in flight when
// one of them was armed, and have ended after that page was compared.
void UnsettledPages::Doubt() {
  ++doubts_;
  young_.Or(ripe_);
  young_.Or(presumed_);
  ripe_.ClearAll();
  presumed_.ClearAll();
  ripe_after_ = presumed_after_ = absl::InfiniteDuration();
}

void UnsettledPages::OnLook(const RequestLook& look, absl::Time now) {
  if (look.longest >= std::min(ripe_after_, presumed_after_)) Doubt();
  ++looks_;
  if (look.longest == absl::InfiniteDuration()) return;
  longest_[looks_ % kLooks] = look.longest;
  if (!ripening_.empty()) {
    const absl::Duration left_alone = look.at - ripening_since_;
    if (left_alone < Patience()) return;
    if (ripe_.empty()) ripe_after_ = absl::InfiniteDuration();
    ripe_after_ = std::min(ripe_after_, left_alone);
    ripe_.Or(ripening_);
    ripening_.ClearAll();
  }
  std::swap(ripening_, young_);
  ripening_since_ = now;
}

void UnsettledPages::OnEqual(absl::Span<const PageRun> runs) {
  std::vector<PageRun> equal;
  for (const PageRun& run : runs) ripe_.AppendRunsWithin(run, &equal);
  if (equal.empty()) return;
  presumed_after_ = std::min(presumed_after_, ripe_after_);
  for (const PageRun& run : equal) {
    ripe_.Clear(run);
    presumed_.Set(run);
  }
}

const PageBitmap& UnsettledPages::AtStandstill(const RequestLook& last) {
  if (last.longest >= std::min(ripe_after_, presumed_after_)) Doubt();
  young_.Or(ripening_);
  young_.Or(ripe_);
  ripening_.ClearAll();
  ripe_.ClearAll();
  return young_;
}

PageBitmap UnsettledPages::All() const {
  PageBitmap all = young_;
  all.Or(ripening_);
  all.Or(ripe_);
  return all;
}

void UnsettledPages::AppendUnsettledWithin(PageRun run, std::vector<PageRun>* out) const {
  for (const PageBitmap* pages : {&young_, &ripening_, &ripe_}) {
    if (!pages->empty()) pages->AppendRunsWithin(run, out);
  }
}

}  // namespace presync
