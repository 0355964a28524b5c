#include "predictor/page_histories.h"

#include <algorithm>
#include <utility>

#include "predictor/bitmap.h"
#include "predictor/check.h"
#include "predictor/learned_page.h"

namespace presync {
namespace {

// The sweep comes by each page this often, so that no age passes 2^13 + 2^12 < 2^14 scans
// unnoticed.
constexpr uint32_t kSweepScans = 4096;
template <typename Page>
constexpr bool kFits = Page::kMaxAge + kSweepScans < 1u << Page::kStampBits &&
                       1u << Page::kMaxStreak <= ArmingRing::kScans;
static_assert(kFits<PageHistory> && kFits<LearnedPage>);

// How many runs ahead the word of an isolated page is asked for (docs/prediction.md, "Cost").
constexpr size_t kPrefetchRuns = 16;

}  // namespace

template <typename Page>
PageHistories<Page>::PageHistories(PageCount pages, uint32_t max_streak)
    : max_streak_(max_streak), histories_(pages), ring_(std::max(pages / 16, PageCount{4096})) {}

template <typename Page>
void PageHistories<Page>::OnScan(absl::Span<const PageRun> written) {
  ++now_;
  to_arm_.clear();
  NoteWritten(written);
  ArmDuePages();
  SaturateOldStamps();
}

template <typename Page>
void PageHistories<Page>::NoteWritten(absl::Span<const PageRun> written) {
  for (size_t i = 0; i < written.size(); ++i) {
    const PageRun run = written[i];
    CheckRun(run);
    if (i + kPrefetchRuns < written.size()) {
      __builtin_prefetch(histories_.data() + written[i + kPrefetchRuns].first, 1);
    }
    for (PageIndex page = run.first; page < run.end(); ++page) {
      Page& history = histories_[page];
      history.OnWritten(now_, run.count);
      const uint32_t wait = history.WaitScans(max_streak_, spare_scans_);
      // With the ring full the page is armed: it costs a fault, never correctness.
      if (wait > 0 && ring_.Add(page, now_ + wait)) {
        history.Wait();
      } else {
        AppendRun({page, 1}, &to_arm_);
      }
    }
  }
}

template <typename Page>
void PageHistories<Page>::ArmDuePages() {
  std::vector<PageRun> due;
  for (const PageRun& run : ring_.TakeDue(now_)) {
    for (PageIndex page = run.first; page < run.end(); ++page) {
      // Sent, or filed anew, since: not this entry's business any more.
      if (!histories_[page].WaitEnds(now_, max_streak_)) continue;
      histories_[page].EndWait(now_);
      AppendRun({page, 1}, &due);
    }
  }
  if (due.empty()) return;
  std::vector<PageRun> merged;
  merged.reserve(due.size() + to_arm_.size());
  auto a = due.begin();
  auto b = to_arm_.begin();
  while (a != due.end() || b != to_arm_.end()) {
    const bool take_due = b == to_arm_.end() || (a != due.end() && a->first < b->first);
    AppendRun(take_due ? *a++ : *b++, &merged);
  }
  to_arm_ = std::move(merged);
}

template <typename Page>
void PageHistories<Page>::OnSent(absl::Span<const PageRun> runs) {
  for (const PageRun& run : runs) {
    CheckRun(run);
    for (PageIndex page = run.first; page < run.end(); ++page) histories_[page].OnSent(now_);
  }
}

template <typename Page>
void PageHistories<Page>::SaturateOldStamps() {
  const PageCount chunk = pages() / kSweepScans + 1;
  for (PageCount left = std::min(chunk, pages()); left > 0; --left) {
    histories_[sweep_next_].Saturate(now_);
    if (++sweep_next_ == pages()) sweep_next_ = 0;
  }
}

template <typename Page>
void PageHistories<Page>::CheckRun(const PageRun& run) const {
  PRESYNC_CHECK(run.first <= pages() && run.count <= pages() - run.first);
}

template class PageHistories<PageHistory>;
template class PageHistories<LearnedPage>;

}  // namespace presync
