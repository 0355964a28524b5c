// What does planning cost, in ns for each page written in a scan: OnScan, AppendPagesToArm, Choose
// and OnSent together? One page in 64 is written in each scan, the set-point is twice that, so that
// Choose weighs about three candidates for each page written. Baseline: counting the bits of the
// stale set and clearing the words of the written pages, the least any planner with a bitmap and a
// word a page has to touch. Run: build/release/benchmarks/benchmark_planner
#include <benchmark/benchmark.h>

#include <bit>
#include <cstdint>
#include <cstring>
#include <memory>
#include <random>
#include <utility>
#include <vector>

#include "predictor/bitmap.h"
#include "predictor/policy.h"

namespace presync {
namespace {

constexpr int kScans = 8;  // different ones, used in turn

// Scans that write one page in 64, in runs of `run_pages` at random places.
std::vector<std::vector<PageRun>> RandomScans(PageCount pages, PageCount run_pages) {
  std::mt19937 random(1);
  std::vector<std::vector<PageRun>> scans(kScans);
  const PageCount stride = 64 * run_pages;
  for (auto& scan : scans) {
    for (PageIndex first = 0; first < pages; first += stride) {
      scan.push_back({first + static_cast<PageIndex>(random() % (stride - run_pages)), run_pages});
    }
  }
  return scans;
}

void SetRates(benchmark::State& state, PageCount pages) {
  state.counters["pages"] = pages;
  state.counters["a_page"] = benchmark::Counter(
      pages, benchmark::Counter::kIsIterationInvariantRate | benchmark::Counter::kInvert);
}

void BM_BaselineTouch(benchmark::State& state) {
  const PageCount pages = state.range(0);
  const auto scans = RandomScans(pages, state.range(1));
  std::vector<uint32_t> words(pages, 1);
  PageBitmap stale(pages);
  size_t scan = 0;
  for (auto _ : state) {
    PageCount count = 0;
    for (uint64_t word : stale.words()) count += std::popcount(word);
    benchmark::DoNotOptimize(count);
    for (const PageRun& run : scans[scan % kScans]) {
      std::memset(&words[run.first], 0, run.count * sizeof(words[0]));
    }
    benchmark::ClobberMemory();
    ++scan;
  }
  SetRates(state, CountPages(scans[0]));
}

void BM_Plan(benchmark::State& state, const char* name) {
  const PageCount pages = state.range(0);
  const auto scans = RandomScans(pages, state.range(1));
  const PageCount written = CountPages(scans[0]);
  auto policy = std::move(MakePolicy(name, pages).value());
  PageBitmap stale(pages);
  std::vector<PageRun> to_arm, chosen;
  size_t scan = 0;
  uint64_t candidates = 0, sent = 0;
  for (auto _ : state) {
    state.PauseTiming();  // the bitmap is the session's, its cost is in benchmark_bitmap
    for (const PageRun& run : chosen) stale.Clear(run);
    for (const PageRun& run : scans[scan % kScans]) stale.Set(run);
    const PageCount excess = stale.count() > 2 * written ? stale.count() - 2 * written : 0;
    candidates += stale.count();
    state.ResumeTiming();

    policy->OnScan(scans[scan % kScans]);
    to_arm.clear();
    policy->AppendPagesToArm(&to_arm);
    policy->Choose(stale, excess, &chosen);
    policy->OnSent(chosen);
    sent += CountPages(chosen);
    ++scan;
  }
  SetRates(state, written);
  state.counters["candidates"] = static_cast<double>(candidates) / scan;
  state.counters["sent"] = static_cast<double>(sent) / scan;
}

// The first pass over a guest: everything is stale, little may be sent at a time.
void BM_ChooseInBulkPhase(benchmark::State& state) {
  auto policy = std::move(MakePolicy("ewma", state.range(0)).value());
  const PageBitmap stale(state.range(0), true);
  std::vector<PageRun> chosen;
  for (auto _ : state) policy->Choose(stale, 2500, &chosen);
  SetRates(state, CountPages(chosen));
}

void Guests(benchmark::internal::Benchmark* benchmark) {
  benchmark->ArgNames({"pages", "run"})->ArgsProduct({{65'536, 1 << 24}, {1, 8}});
}

BENCHMARK(BM_BaselineTouch)->Apply(Guests);
BENCHMARK_CAPTURE(BM_Plan, every_scan, "every-scan")->Apply(Guests);
BENCHMARK_CAPTURE(BM_Plan, oldest, "oldest")->Apply(Guests);
BENCHMARK_CAPTURE(BM_Plan, ewma, "ewma")->Apply(Guests);
BENCHMARK_CAPTURE(BM_Plan, learned, "learned")->Apply(Guests);
BENCHMARK(BM_ChooseInBulkPhase)->ArgName("pages")->Arg(65'536)->Arg(1 << 24);

}  // namespace
}  // namespace presync
