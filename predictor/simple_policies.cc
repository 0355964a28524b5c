#include "predictor/simple_policies.h"

#include <algorithm>
#include <limits>
#include <string_view>
#include <vector>

#include "predictor/bitmap.h"
#include "predictor/check.h"

namespace presync {
namespace {

// Appends the first `pages` of `candidates`; says how many are still wanted.
PageCount TakeByAddress(const PageBitmap& candidates, PageCount pages, std::vector<PageRun>* out) {
  PageIndex from = 0;
  while (pages > 0) {
    const auto run = candidates.NextRun(from, pages);
    if (!run) break;
    out->push_back(*run);
    from = run->end();
    pages -= run->count;
  }
  return pages;
}

// Sends all, in address order: once in so many scans.
class PeriodicPolicy final : public SendPolicy {
 public:
  PeriodicPolicy(std::string_view name, uint32_t every_scans)
      : name_(name), every_scans_(every_scans) {}

  std::string_view name() const override { return name_; }
  void OnScan(absl::Span<const PageRun>) override { ++now_; }
  void AppendPagesToArm(std::vector<PageRun>*) override {}
  void OnSent(absl::Span<const PageRun>) override {}

  PageCount Goal(PageCount) override {
    return now_ % every_scans_ == 0 ? 0 : std::numeric_limits<PageCount>::max();
  }

  void Choose(const PageBitmap& candidates, PageCount pages,
              std::vector<PageRun>* chosen) override {
    chosen->clear();
    TakeByAddress(candidates, pages, chosen);
  }

 private:
  std::string_view name_;
  uint32_t every_scans_;
  uint32_t now_ = 0;
};

class SkipIfDirtyPolicy final : public SendPolicy {
 public:
  explicit SkipIfDirtyPolicy(PageCount pages) : dirty_again_(pages) {}

  std::string_view name() const override { return "skip-if-dirty"; }

  void OnScan(absl::Span<const PageRun> written) override {
    for (const PageRun& run : written_) dirty_again_.Clear(run);
    written_.assign(written.begin(), written.end());
    for (const PageRun& run : written_) dirty_again_.Set(run);
  }

  void AppendPagesToArm(std::vector<PageRun>* out) override {
    for (const PageRun& run : written_) AppendRun(run, out);
  }

  void Choose(const PageBitmap& candidates, PageCount pages,
              std::vector<PageRun>* chosen) override {
    PRESYNC_CHECK(candidates.size() == dirty_again_.size());
    PageBitmap quiet = candidates;
    quiet.AndNot(dirty_again_);
    chosen->clear();
    const PageCount left = TakeByAddress(quiet, pages, chosen);
    if (left == 0) return;
    PageBitmap dirty = candidates;
    dirty.And(dirty_again_);
    TakeByAddress(dirty, left, chosen);
    std::sort(chosen->begin(), chosen->end(),
              [](const PageRun& a, const PageRun& b) { return a.first < b.first; });
    std::vector<PageRun> merged;
    for (const PageRun& run : *chosen) AppendRun(run, &merged);
    chosen->swap(merged);
  }

  void OnSent(absl::Span<const PageRun>) override {}

 private:
  PageBitmap dirty_again_;
  std::vector<PageRun> written_;
};

}  // namespace

std::unique_ptr<SendPolicy> MakeEveryScanPolicy() {
  return std::make_unique<PeriodicPolicy>("every-scan", 1);
}

std::unique_ptr<SendPolicy> MakeOnceASecondPolicy(uint32_t scans_per_second) {
  PRESYNC_CHECK(scans_per_second > 0);
  return std::make_unique<PeriodicPolicy>("once-a-second", scans_per_second);
}

std::unique_ptr<SendPolicy> MakeSkipIfDirtyPolicy(PageCount pages) {
  return std::make_unique<SkipIfDirtyPolicy>(pages);
}

}  // namespace presync
