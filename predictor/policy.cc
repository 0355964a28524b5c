#include "predictor/policy.h"

#include <algorithm>
#include <string>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "predictor/check.h"
#include "predictor/choose.h"
#include "predictor/page_histories.h"

namespace presync {
namespace {

// Longest predicted gap first: the larger of the EWMA of the gaps and the time since the last
// write.
struct EwmaScore {
  static constexpr std::string_view kName = "ewma";
  static constexpr uint32_t kClasses = 64;  // quarters of an octave; the top one: never written

  static uint32_t Of(const PageHistory& history, uint32_t now) {
    if (!history.written()) return kClasses - 1;
    const uint32_t age = Log2Sixteenths(history.Age(now) + 1);
    return std::max(history.gap_log2_sixteenths(), age) / 4;
  }
};
static_assert(Log2Sixteenths(PageHistory::kMaxAge + 1) / 4 < EwmaScore::kClasses - 1);

// Oldest last write first, to the scan.
struct OldestScore {
  static constexpr std::string_view kName = "oldest";
  static constexpr uint32_t kClasses = PageHistory::kMaxAge + 2;  // the top one: never written

  static uint32_t Of(const PageHistory& history, uint32_t now) {
    return history.written() ? history.Age(now) : kClasses - 1;
  }
};

template <typename Score>
class HistoryPolicy final : public SendPolicy {
 public:
  HistoryPolicy(PageCount pages, uint32_t max_streak) : histories_(pages, max_streak) {}

  std::string_view name() const override { return Score::kName; }
  void OnScan(absl::Span<const PageRun> written) override { histories_.OnScan(written); }
  void OnSent(absl::Span<const PageRun> runs) override { histories_.OnSent(runs); }

  void AppendPagesToArm(std::vector<PageRun>* out) override {
    out->insert(out->end(), histories_.to_arm().begin(), histories_.to_arm().end());
  }

  void Choose(const PageBitmap& candidates, PageCount pages,
              std::vector<PageRun>* chosen) override {
    PRESYNC_CHECK(candidates.size() == histories_.pages());
    ChooseByScore(
        candidates, pages, Score::kClasses,
        [this](PageIndex page) { __builtin_prefetch(histories_.data() + page); },
        [this](PageIndex page) { return Score::Of(histories_[page], histories_.now()); }, chosen);
  }

 private:
  PageHistories histories_;
};

// The baseline: every stale page, in address order. It arms a page only by sending it: to see
// another write of a page that is stale anyway would tell it nothing.
class EveryScanPolicy final : public SendPolicy {
 public:
  static constexpr std::string_view kName = "every-scan";

  std::string_view name() const override { return kName; }
  void OnScan(absl::Span<const PageRun>) override {}
  void AppendPagesToArm(std::vector<PageRun>*) override {}
  void OnSent(absl::Span<const PageRun>) override {}

  void Choose(const PageBitmap& candidates, PageCount pages,
              std::vector<PageRun>* chosen) override {
    chosen->clear();
    PageIndex from = 0;
    while (pages > 0) {
      const auto run = candidates.NextRun(from, pages);
      if (!run) return;
      chosen->push_back(*run);
      from = run->end();
      pages -= run->count;
    }
  }
};

}  // namespace

absl::StatusOr<std::unique_ptr<SendPolicy>> MakePolicy(std::string_view name, PageCount pages,
                                                       const PolicyOptions& options) {
  const uint32_t max_streak = options.max_back_off_log2;
  // Debian builds abseil for C++14, where absl::string_view is not std::string_view: hence the
  // strings.
  const std::string title = absl::StrCat("make send policy \"", std::string(name), "\": ");
  if (max_streak > PageHistory::kMaxStreak) {
    return absl::InvalidArgumentError(absl::StrCat(title, "arming back-off of up to 2^", max_streak,
                                                   " scans; the most is 2^",
                                                   uint32_t{PageHistory::kMaxStreak}));
  }
  if (name == EwmaScore::kName)
    return std::make_unique<HistoryPolicy<EwmaScore>>(pages, max_streak);
  if (name == OldestScore::kName) {
    return std::make_unique<HistoryPolicy<OldestScore>>(pages, max_streak);
  }
  if (name == EveryScanPolicy::kName) return std::make_unique<EveryScanPolicy>();
  std::string known;
  for (std::string_view each : PolicyNames()) {
    absl::StrAppend(&known, known.empty() ? "" : ", ", std::string(each));
  }
  return absl::InvalidArgumentError(absl::StrCat(title, "no such policy; there are ", known));
}

std::vector<std::string_view> PolicyNames() {
  return {EwmaScore::kName, OldestScore::kName, EveryScanPolicy::kName};
}

}  // namespace presync
