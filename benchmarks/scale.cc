// What does planning a large guest cost: memory, time for each scan, time for each page written?
// Up to 1 TiB, on one thread or on two that share the guest by address. 65,536 pages are written in
// each scan (2.7 GB/s at 100 ms) in runs of 4: seven in ten of them in a hot 4 GiB, more often the
// lower the address, the rest anywhere; the set-point is 1 GiB. As in a replay, a page is only seen
// written while it is armed. Baseline: `every-scan`, which keeps nothing of a page.
// Run: build/release/benchmarks/benchmark_scale
#include <benchmark/benchmark.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <fstream>
#include <memory>
#include <random>
#include <utility>
#include <vector>

#include "predictor/bitmap.h"
#include "predictor/policy.h"

namespace presync {
namespace {

constexpr PageCount kWritten = 1 << 16;  // in a scan, by the whole guest
constexpr PageCount kRunPages = 4;
constexpr PageCount kHotPages = 1 << 20;
constexpr PageCount kSetPoint = 1 << 18;
constexpr int kScans = 64;  // different ones, used in turn
constexpr int kWarmUpScans = 128;

double ResidentMiB() {
  uint64_t total = 0, resident = 0;
  std::ifstream("/proc/self/statm") >> total >> resident;
  return static_cast<double>(resident * sysconf(_SC_PAGESIZE)) / (1 << 20);
}

// One thread's part of the guest, by itself.
class Shard {
 public:
  Shard(const char* name, PageCount pages, int shards)
      : set_point_(kSetPoint / shards),
        policy_(std::move(MakePolicy(name, pages).value())),
        armed_(pages, true),
        stale_(pages) {
    std::mt19937 random(1);
    const PageCount hot = std::min<PageCount>(kHotPages / shards, pages);
    for (int scan = 0; scan < kScans; ++scan) {
      PageBitmap written(pages);
      while (written.count() < kWritten / shards) {
        // The square of a uniform number: twice as often in the lower quarter.
        const double uniform = (random() >> 8) * 0x1p-24;
        const double place = random() % 10 < 7 ? uniform * uniform * hot : uniform * pages;
        const PageIndex first = static_cast<PageIndex>(place) / kRunPages * kRunPages;
        written.Set({first, std::min(kRunPages, pages - first)});
      }
      written.AppendRunsWithin({0, pages}, &scans_.emplace_back());
    }
  }

  // Seconds spent in the policy.
  double Scan() {
    seen_.clear();
    for (const PageRun& run : scans_[now_++ % kScans]) armed_.AppendRunsWithin(run, &seen_);
    for (const PageRun& run : seen_) {
      armed_.Clear(run);
      stale_.Set(run);
    }
    faults_ += CountPages(seen_);
    const auto start = std::chrono::steady_clock::now();
    to_arm_.clear();
    chosen_.clear();
    policy_->OnScan(seen_);
    policy_->AppendPagesToArm(&to_arm_);
    const PageCount goal = policy_->Goal(set_point_);
    if (stale_.count() > goal) policy_->Choose(stale_, stale_.count() - goal, &chosen_);
    policy_->OnSent(chosen_);
    const auto end = std::chrono::steady_clock::now();
    for (const PageRun& run : to_arm_) armed_.Set(run);
    for (const PageRun& run : chosen_) {
      armed_.Set(run);
      stale_.Clear(run);
    }
    sent_ += CountPages(chosen_);
    return std::chrono::duration<double>(end - start).count();
  }

  uint64_t faults() const { return faults_; }
  uint64_t sent() const { return sent_; }

 private:
  PageCount set_point_;
  std::unique_ptr<SendPolicy> policy_;
  PageBitmap armed_, stale_;
  std::vector<std::vector<PageRun>> scans_;
  std::vector<PageRun> seen_, to_arm_, chosen_;
  size_t now_ = 0;
  uint64_t faults_ = 0, sent_ = 0;
};

void BM_Scale(benchmark::State& state, const char* name) {
  const int shards = state.threads();
  Shard shard(name, static_cast<PageCount>((int64_t{state.range(0)} << 18) / shards), shards);
  for (int scan = 0; scan < kWarmUpScans; ++scan) shard.Scan();
  const uint64_t faults = shard.faults(), sent = shard.sent();
  for (auto _ : state) state.SetIterationTime(shard.Scan());
  const double written = static_cast<double>(kWritten / shards) * state.iterations();
  state.counters["a_page"] =  // of its own thread's time
      benchmark::Counter(kWritten / shards, benchmark::Counter::kIsIterationInvariantRate |
                                                benchmark::Counter::kInvert |
                                                benchmark::Counter::kAvgThreads);
  state.counters["faults"] =
      benchmark::Counter((shard.faults() - faults) / written, benchmark::Counter::kAvgThreads);
  state.counters["sent"] =
      benchmark::Counter((shard.sent() - sent) / written, benchmark::Counter::kAvgThreads);
  state.counters["resident_MiB"] =
      benchmark::Counter(ResidentMiB(), benchmark::Counter::kAvgThreads);
}

void Guests(benchmark::internal::Benchmark* benchmark) {
  benchmark->ArgName("GiB")->Arg(64)->Arg(1024)->Threads(1)->Threads(2);
  benchmark->UseManualTime()->Iterations(100)->Unit(benchmark::kMillisecond);
}

BENCHMARK_CAPTURE(BM_Scale, every_scan, "every-scan")->Apply(Guests);
BENCHMARK_CAPTURE(BM_Scale, ewma, "ewma")->Apply(Guests);
BENCHMARK_CAPTURE(BM_Scale, learned, "learned")->Apply(Guests);

}  // namespace
}  // namespace presync
