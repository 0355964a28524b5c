#include "predictor/history_policies.h"

#include <algorithm>
#include <string_view>
#include <vector>

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
  PageHistories<PageHistory> histories_;
};

}  // namespace

std::unique_ptr<SendPolicy> MakeEwmaPolicy(PageCount pages, uint32_t max_streak) {
  return std::make_unique<HistoryPolicy<EwmaScore>>(pages, max_streak);
}

std::unique_ptr<SendPolicy> MakeOldestPolicy(PageCount pages, uint32_t max_streak) {
  return std::make_unique<HistoryPolicy<OldestScore>>(pages, max_streak);
}

}  // namespace presync
