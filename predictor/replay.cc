#include "predictor/replay.h"

#include <algorithm>
#include <limits>
#include <utility>
#include <vector>

#include "predictor/bitmap.h"
#include "predictor/check.h"

namespace presync {
namespace {

// The set of pages as the sync sees them, and what happens to it in a scan.
class Sync {
 public:
  Sync(const TraceHeader& header, SendPolicy& policy, const ReplayOptions& options)
      : policy_(policy),
        options_(options),
        scan_budget_bytes_(BudgetBytes(header, options.cost)),
        clock_cost_(ClockCost(options)),
        armed_(header.pages, true),
        stale_(header.pages) {}

  void Scan(absl::Span<const PageRun> written, ReplayResult* result) {
    seen_.clear();
    for (const PageRun& run : written) armed_.AppendRunsWithin(run, &seen_);
    for (const PageRun& run : seen_) {
      armed_.Clear(run);
      stale_.Set(run);
      result->write_faults += run.count;
    }
    Timed(result, [&] {
      Plan();
      policy_.OnSent(chosen_);
    });
    for (const PageRun& run : to_arm_) {
      PRESYNC_CHECK(stale_.CountWithin(run) == run.count);  // synced pages are armed already
      armed_.Set(run);
    }
    for (const PageRun& run : chosen_) {
      PRESYNC_CHECK(stale_.Clear(run) == run.count);
      armed_.Set(run);
      result->pages_sent += run.count;
    }
  }

  PageCount residual() const { return stale_.count(); }

 private:
  static uint64_t BudgetBytes(const TraceHeader& header, const LaunchCost& cost) {
    if (cost.link_bytes_per_s == 0) return std::numeric_limits<uint64_t>::max();
    return static_cast<uint64_t>(static_cast<double>(cost.link_bytes_per_s) *
                                 header.scan_interval_us / 1e6);
  }

  // What two readings in a row say: the median of many.
  static absl::Duration ClockCost(const ReplayOptions& options) {
    if (!options.cpu_time) return absl::ZeroDuration();
    std::vector<absl::Duration> costs(101);
    for (absl::Duration& cost : costs) {
      const absl::Duration start = options.cpu_time();
      cost = options.cpu_time() - start;
    }
    std::nth_element(costs.begin(), costs.begin() + costs.size() / 2, costs.end());
    return costs[costs.size() / 2];
  }

  void Plan() {
    to_arm_.clear();
    chosen_.clear();
    policy_.OnScan(seen_);
    policy_.AppendPagesToArm(&to_arm_);
    const PageCount goal = policy_.Goal(options_.set_point);
    const PageCount pages = PagesToSend(stale_.count(), goal, scan_budget_bytes_);
    if (pages > 0) policy_.Choose(stale_, pages, &chosen_);
  }

  template <typename Body>
  void Timed(ReplayResult* result, Body body) {
    const absl::Duration start = options_.cpu_time ? options_.cpu_time() : absl::ZeroDuration();
    body();
    if (options_.cpu_time) result->policy_cpu += options_.cpu_time() - start - clock_cost_;
  }

  SendPolicy& policy_;
  const ReplayOptions& options_;
  uint64_t scan_budget_bytes_;
  absl::Duration clock_cost_;
  PageBitmap armed_;
  PageBitmap stale_;
  std::vector<PageRun> seen_, to_arm_, chosen_;
};

void Summarize(std::vector<PageCount> residuals, const LaunchCost& cost, ReplayResult* result) {
  if (residuals.empty()) return;
  const size_t n = residuals.size();
  uint64_t sum = 0;
  for (PageCount residual : residuals) sum += residual;
  std::sort(residuals.begin(), residuals.end());
  result->residual_mean_pages = static_cast<double>(sum) / static_cast<double>(n);
  result->residual_p95_pages = residuals[(n * 95 + 99) / 100 - 1];
  result->residual_max_pages = residuals.back();
  if (cost.link_bytes_per_s == 0) return;
  // The prediction is linear, so the mean of the predictions is that of the mean.
  result->launch_mean = cost.fixed + absl::Seconds(result->residual_mean_pages * kPageBytes /
                                                   static_cast<double>(cost.link_bytes_per_s));
  result->launch_p95 = PredictLaunchTime(result->residual_p95_pages, cost);
}

// Appends the `pages` candidates whose `key` is smallest, ties by lowest address.
template <typename Key>
void TakeSmallest(const PageBitmap& candidates, PageCount pages, Key key,
                  std::vector<PageRun>* chosen) {
  std::vector<std::pair<uint64_t, PageIndex>> order;
  order.reserve(candidates.count());
  for (auto run = candidates.NextRun(0); run; run = candidates.NextRun(run->end())) {
    for (PageIndex page = run->first; page < run->end(); ++page) {
      order.emplace_back(key(page), page);
    }
  }
  if (pages < order.size()) {
    std::nth_element(order.begin(), order.begin() + pages, order.end());
    order.resize(pages);
  }
  std::sort(order.begin(), order.end(),
            [](const auto& a, const auto& b) { return a.second < b.second; });
  for (const auto& [_, page] : order) AppendRun({page, 1}, chosen);
}

constexpr uint32_t kNever = std::numeric_limits<uint32_t>::max();

class Optimum final : public SendPolicy {
 public:
  explicit Optimum(const Trace& trace) : trace_(trace), next_(trace.header().pages, kNever) {
    next_writes_.resize(trace.pages_written());
    size_t i = next_writes_.size();
    for (size_t scan = trace.scans(); scan-- > 0;) {
      const absl::Span<const PageRun> runs = trace.Scan(scan);
      for (auto run = runs.rbegin(); run != runs.rend(); ++run) {
        for (PageIndex page = run->end(); page-- > run->first;) {
          next_writes_[--i] = std::exchange(next_[page], static_cast<uint32_t>(scan));
        }
      }
    }
  }

  std::string_view name() const override { return "optimum"; }

  void OnScan(absl::Span<const PageRun>) override {
    PRESYNC_CHECK(scan_ < trace_.scans());
    for (const PageRun& run : trace_.Scan(scan_++)) {
      for (PageIndex page = run.first; page < run.end(); ++page) {
        next_[page] = next_writes_[written_++];
      }
    }
  }

  // It needs to see nothing: a page is armed by being sent.
  void AppendPagesToArm(std::vector<PageRun>*) override {}
  void OnSent(absl::Span<const PageRun>) override {}

  void Choose(const PageBitmap& candidates, PageCount pages,
              std::vector<PageRun>* chosen) override {
    chosen->clear();
    const auto soonest_last = [this](PageIndex page) { return kNever - next_[page]; };
    TakeSmallest(candidates, pages, soonest_last, chosen);
  }

 private:
  const Trace& trace_;
  std::vector<uint32_t> next_;         // of each page, from the current scan on
  std::vector<uint32_t> next_writes_;  // for each page of each scan in turn: the scan after it
  size_t scan_ = 0;
  size_t written_ = 0;
};

class KnownRates final : public SendPolicy {
 public:
  KnownRates(const Trace& trace, size_t within)
      : trace_(trace), within_(within), writes_(trace.header().pages), last_(trace.header().pages) {
    for (size_t scan = 0; scan < std::min(within, trace.scans()); ++scan) Count(scan, 1);
  }

  std::string_view name() const override { return "known-rates"; }

  void OnScan(absl::Span<const PageRun>) override {
    PRESYNC_CHECK(scan_ < trace_.scans());
    if (scan_ + within_ < trace_.scans()) Count(scan_ + within_, 1);
    if (scan_ > within_) Count(scan_ - within_ - 1, -1);
    for (const PageRun& run : trace_.Scan(scan_)) {
      std::fill_n(last_.begin() + run.first, run.count, static_cast<uint32_t>(scan_));
    }
    ++scan_;
  }

  // It needs to see nothing, as the optimum.
  void AppendPagesToArm(std::vector<PageRun>*) override {}
  void OnSent(absl::Span<const PageRun>) override {}

  void Choose(const PageBitmap& candidates, PageCount pages,
              std::vector<PageRun>* chosen) override {
    chosen->clear();
    const auto rarest_first = [this](PageIndex page) {
      return uint64_t{writes_[page]} << 32 | last_[page];
    };
    TakeSmallest(candidates, pages, rarest_first, chosen);
  }

 private:
  void Count(size_t scan, int by) {
    for (const PageRun& run : trace_.Scan(scan)) {
      for (PageIndex page = run.first; page < run.end(); ++page) writes_[page] += by;
    }
  }

  const Trace& trace_;
  const size_t within_;
  std::vector<uint32_t> writes_;  // of each page, in the scans around the current one
  std::vector<uint32_t> last_;    // the scan of its last write
  size_t scan_ = 0;
};

}  // namespace

ReplayResult Replay(const Trace& trace, SendPolicy& policy, const ReplayOptions& options) {
  ReplayResult result;
  Sync sync(trace.header(), policy, options);
  std::vector<PageCount> residuals;
  residuals.reserve(trace.scans());
  for (size_t i = 0; i < trace.scans(); ++i) {
    sync.Scan(trace.Scan(i), &result);
    residuals.push_back(sync.residual());
  }
  result.scans = trace.scans();
  result.pages_written = trace.pages_written();
  Summarize(std::move(residuals), options.cost, &result);
  return result;
}

std::unique_ptr<SendPolicy> MakeOptimum(const Trace& trace) {
  return std::make_unique<Optimum>(trace);
}

std::unique_ptr<SendPolicy> MakeKnownRates(const Trace& trace, size_t within) {
  return std::make_unique<KnownRates>(trace, within);
}

uint64_t EveryScanPages(const Trace& trace) { return trace.pages_written(); }

uint64_t OnceASecondPages(const Trace& trace) {
  const uint32_t scans_per_second = ScansPerSecond(trace.header());
  PageBitmap second(trace.header().pages);
  uint64_t pages = 0;
  for (size_t i = 0; i < trace.scans(); ++i) {
    for (const PageRun& run : trace.Scan(i)) second.Set(run);
    if ((i + 1) % scans_per_second != 0) continue;
    pages += second.count();
    second.ClearAll();
  }
  return pages;  // what a last, incomplete second wrote is not sent
}

uint32_t ScansPerSecond(const TraceHeader& header) {
  return std::max(1'000'000 / header.scan_interval_us, 1u);
}

}  // namespace presync
