// The histories of all pages of a guest, and with them which written pages are worth arming.
#pragma once

#include <cstdint>
#include <vector>

#include "absl/types/span.h"
#include "predictor/arming_ring.h"
#include "predictor/page.h"
#include "predictor/page_history.h"

namespace presync {

// What the policies that predict share, over the word that each keeps of a page (PageHistory,
// LearnedPage). 4 bytes a page, and for pages in back-off 8 bytes a run, at
// most half a byte a page (but always room for 4096 runs). Not thread-safe. Preconditions
// (CHECKed): runs end at or below pages().
template <typename Page>
class PageHistories {
 public:
  // Back-off spans are at most 2^max_streak scans; 0 turns it off.
  PageHistories(PageCount pages, uint32_t max_streak);

  PageCount pages() const { return static_cast<PageCount>(histories_.size()); }
  uint32_t now() const { return now_; }
  const Page& operator[](PageIndex page) const { return histories_[page]; }
  const Page* data() const { return histories_.data(); }

  // As in SendPolicy.
  void OnScan(absl::Span<const PageRun> written);
  void OnSent(absl::Span<const PageRun> runs);

  // Nobody needs to know within so many scans (below 2^14) whether a page was written: one that is
  // expected to be may go unwatched for so long. For pages that know of it (LearnedPage).
  void SetSpareScans(uint32_t scans) { spare_scans_ = scans; }

  // The pages to arm after this scan; valid until the next OnScan.
  absl::Span<const PageRun> to_arm() const { return to_arm_; }

 private:
  // Appends to `to_arm_` the pages of `written` that need no back-off, and files the others.
  void NoteWritten(absl::Span<const PageRun> written);
  // Ends the waits that end now, and merges their pages into `to_arm_`.
  void ArmDuePages();
  void SaturateOldStamps();
  void CheckRun(const PageRun& run) const;

  uint32_t max_streak_;
  uint32_t spare_scans_ = 0;
  uint32_t now_ = 0;
  PageIndex sweep_next_ = 0;
  std::vector<Page> histories_;
  ArmingRing ring_;
  std::vector<PageRun> to_arm_;
};

}  // namespace presync
