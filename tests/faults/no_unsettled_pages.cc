// In place of transport/sync/unsettled_pages.cc, for presyncd_without_the_rule: a presyncd that
// takes a page for synced as soon as it was armed, read and confirmed, as presync once did.
// tests/slow_disk
// --without-the-rule shows that it loses bytes.
#include "transport/sync/unsettled_pages.h"

namespace presync {

UnsettledPages::UnsettledPages(PageCount pages, absl::Duration patience)
    : patience_(patience), young_(pages), ripening_(pages), ripe_(pages), presumed_(pages) {}
void UnsettledPages::OnRead(PageRun) {}
void UnsettledPages::Forget(PageRun) {}
void UnsettledPages::OnLook(const RequestLook&, absl::Time) {}
void UnsettledPages::OnEqual(absl::Span<const PageRun>) {}
const PageBitmap& UnsettledPages::AtStandstill(const RequestLook&) { return young_; }
PageBitmap UnsettledPages::All() const { return young_; }
void UnsettledPages::AppendUnsettledWithin(PageRun, std::vector<PageRun>*) const {}

}  // namespace presync
