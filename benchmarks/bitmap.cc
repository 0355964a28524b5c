// What does a walk over a guest's bitmap cost, in ns for each page found, and what is the least it
// could cost? Baseline: a popcount over as many plain words. Run:
// build/release/benchmarks/benchmark_bitmap
#include "predictor/bitmap.h"

#include <benchmark/benchmark.h>

#include <bit>
#include <cstdint>
#include <vector>

namespace presync {
namespace {

// Every 128th page begins a run of `run_pages`.
PageBitmap Scattered(PageCount pages, PageCount run_pages) {
  PageBitmap bitmap(pages);
  for (PageIndex first = 0; first < pages; first += 128) bitmap.Set({first, run_pages});
  return bitmap;
}

void SetRates(benchmark::State& state, PageCount found) {
  state.counters["a_page"] = benchmark::Counter(
      found, benchmark::Counter::kIsIterationInvariantRate | benchmark::Counter::kInvert);
}

void BM_BaselinePopcount(benchmark::State& state) {
  const PageBitmap bitmap = Scattered(state.range(0), state.range(1));
  for (auto _ : state) {
    PageCount count = 0;
    for (uint64_t word : bitmap.words()) count += std::popcount(word);
    benchmark::DoNotOptimize(count);
  }
  SetRates(state, bitmap.count());
}

void BM_NextRun(benchmark::State& state) {
  const PageBitmap bitmap = Scattered(state.range(0), state.range(1));
  for (auto _ : state) {
    for (auto run = bitmap.NextRun(0); run; run = bitmap.NextRun(run->end())) {
      benchmark::DoNotOptimize(run);
    }
  }
  SetRates(state, bitmap.count());
}

void BM_AppendRunsWithin(benchmark::State& state) {
  const PageBitmap bitmap = Scattered(state.range(0), state.range(1));
  std::vector<PageRun> runs;
  for (auto _ : state) {
    runs.clear();
    bitmap.AppendRunsWithin({0, bitmap.size()}, &runs);
    benchmark::DoNotOptimize(runs.data());
  }
  SetRates(state, bitmap.count());
}

void BM_SetAndClearRuns(benchmark::State& state) {
  PageBitmap bitmap = Scattered(state.range(0), state.range(1));
  std::vector<PageRun> runs;
  bitmap.AppendRunsWithin({0, bitmap.size()}, &runs);
  const PageCount pages = bitmap.count();
  for (auto _ : state) {
    for (const PageRun& run : runs) bitmap.Clear(run);
    for (const PageRun& run : runs) bitmap.Set(run);
  }
  SetRates(state, 2 * pages);
}

void Guests(benchmark::internal::Benchmark* benchmark) {
  benchmark->ArgNames({"pages", "run"})->ArgsProduct({{65'536, 1 << 24}, {1, 8}});
}

BENCHMARK(BM_BaselinePopcount)->Apply(Guests);
BENCHMARK(BM_NextRun)->Apply(Guests);
BENCHMARK(BM_AppendRunsWithin)->Apply(Guests);
BENCHMARK(BM_SetAndClearRuns)->Apply(Guests);

}  // namespace
}  // namespace presync
