// What do a scan and arming cost, with a 256 MB guest, for each dirty log? Baseline of the scan:
// reading the guest's /proc/PID/pagemap plainly and looking at every entry. Baseline of arming:
// PAGEMAP_SCAN with PM_SCAN_WP_MATCHING, run by run.
#include <benchmark/benchmark.h>
#include <fcntl.h>

#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <memory>
#include <sstream>
#include <string>
#include <vector>

#include "qemu-glue/dirty_log/guest_maps.h"
#include "qemu-glue/dirty_log/probe.h"
#include "qemu-glue/plugin/kernel_abi.h"
#include "tests/qemu-glue/dirty_log/guest_fixture.h"
#include "transport/clock.h"

namespace presync {
namespace {

constexpr PageCount kPages = 65536;  // 256 MB
constexpr DirtyLogMode kModes[] = {DirtyLogMode::kUffdAsync, DirtyLogMode::kUffdHandler};

template <typename T>
T Require(absl::StatusOr<T> value) {
  if (!value.ok()) {
    std::fprintf(stderr, "%s\n", value.status().ToString().c_str());
    std::exit(1);
  }
  return *std::move(value);
}

void Require(const absl::Status& status) {
  Require(absl::StatusOr<int>(status.ok() ? absl::StatusOr<int>(0) : status));
}

// A guest that has written all its memory once.
struct Bench {
  explicit Bench(DirtyLogMode mode) : guest(std::vector<testing::GuestRegionSpec>{{kPages}}) {
    guest.Do(GUEST_STORE, 0, 0, kPages);
    log = Require(ProbeDirtyLog({guest.socket(), guest.process(), guest.regions(), mode})).log;
    const std::string folder = "/proc/" + std::to_string(guest.pid());
    std::ostringstream maps;
    maps << std::ifstream(folder + "/maps").rdbuf();
    address = Require(FindSegments(maps.str(), guest.regions()))[0].address;
    pagemap.reset(::open((folder + "/pagemap").c_str(), O_RDONLY | O_CLOEXEC));
  }

  void Write(const std::vector<PageRun>& runs) {
    for (const PageRun& run : runs) guest.Do(GUEST_STORE, 0, run.first, run.count);
  }

  testing::SyntheticGuest guest;
  std::unique_ptr<DirtyLog> log;
  uint64_t address = 0;
  UniqueFd pagemap;
};

std::vector<PageRun> Scattered(PageCount runs, PageCount pages_each) {
  std::vector<PageRun> scattered;
  for (PageCount i = 0; i < runs; ++i) scattered.push_back({i * (kPages / runs), pages_each});
  return scattered;
}

// Besides the mean, the fastest time is kept: it is what the work costs on a machine that has
// others to serve as well.
template <typename Body>
void Time(benchmark::State& state, Body body) {
  const absl::Time start = MonotonicNow();
  body();
  const absl::Duration took = MonotonicNow() - start;
  state.SetIterationTime(absl::ToDoubleSeconds(took));
  const double took_us = absl::ToDoubleMicroseconds(took);
  benchmark::Counter& fastest = state.counters["min_us"];
  if (fastest.value == 0 || took_us < fastest.value) fastest.value = took_us;
}

void BM_Peek(benchmark::State& state) {
  Bench bench(kModes[state.range(0)]);
  const std::vector<PageRun> runs = state.range(1) == 0
                                        ? std::vector<PageRun>()
                                        : Scattered(static_cast<PageCount>(state.range(1)), 1);
  Require(bench.log->Arm({{0, kPages}}));
  std::vector<PageRun> written;
  for (auto _ : state) {
    bench.Write(runs);
    written.clear();
    Time(state, [&] { Require(bench.log->Peek(&written)); });
    if (written != runs) state.SkipWithError("not what was written");
    Require(bench.log->Arm(written));
  }
  state.SetLabel(std::string(bench.log->name()));
}
BENCHMARK(BM_Peek)->ArgsProduct({{0, 1}, {0, 100, 1000}})->UseManualTime()->Iterations(50);

// The baseline: it says the same as a scan, without taking anything.
void BM_PlainPagemap(benchmark::State& state) {
  Bench bench(DirtyLogMode::kUffdAsync);
  const std::vector<PageRun> runs = Scattered(static_cast<PageCount>(state.range(0)), 1);
  Require(bench.log->Arm({{0, kPages}}));
  bench.Write(runs);
  std::vector<uint64_t> entries(kPages);
  for (auto _ : state) {
    PageCount written = 0;
    Time(state, [&] {
      if (::pread(bench.pagemap.get(), entries.data(), kPages * 8,
                  static_cast<off_t>(bench.address / kPageBytes * 8)) != kPages * 8) {
        state.SkipWithError("pagemap");
      }
      for (const uint64_t entry : entries) written += (entry & PRESYNC_PAGEMAP_UFFD_WP) == 0;
    });
    if (written != runs.size()) state.SkipWithError("not what was written");
  }
}
BENCHMARK(BM_PlainPagemap)->Arg(1000)->UseManualTime()->Iterations(50);

void BM_ArmScattered(benchmark::State& state) {
  Bench bench(kModes[state.range(0)]);
  const std::vector<PageRun> runs = Scattered(350, static_cast<PageCount>(state.range(1)));
  Require(bench.log->Arm({{0, kPages}}));
  for (auto _ : state) {
    bench.Write(runs);
    Time(state, [&] { Require(bench.log->Arm(runs)); });
  }
  state.SetLabel(std::string(bench.log->name()));
}
BENCHMARK(BM_ArmScattered)->ArgsProduct({{0, 1}, {1, 8}})->UseManualTime()->Iterations(50);

void ArmByScan(benchmark::State& state, const Bench& bench, PageRun run) {
  pm_scan_arg arg = {};
  arg.size = sizeof(arg);
  arg.flags = PM_SCAN_CHECK_WPASYNC | PM_SCAN_WP_MATCHING;
  arg.start = bench.address + PagesToBytes(run.first);
  arg.end = arg.start + PagesToBytes(run.count);
  arg.category_mask = PAGE_IS_WRITTEN;
  arg.return_mask = PAGE_IS_WRITTEN;
  if (::ioctl(bench.pagemap.get(), PAGEMAP_SCAN, &arg) < 0) state.SkipWithError("scan");
}

void BM_ArmScatteredByScan(benchmark::State& state) {
  Bench bench(DirtyLogMode::kUffdAsync);
  const std::vector<PageRun> runs = Scattered(350, static_cast<PageCount>(state.range(0)));
  Require(bench.log->Arm({{0, kPages}}));
  for (auto _ : state) {
    bench.Write(runs);
    Time(state, [&] {
      for (const PageRun& run : runs) ArmByScan(state, bench, run);
    });
  }
}
BENCHMARK(BM_ArmScatteredByScan)->Arg(1)->Arg(8)->UseManualTime()->Iterations(50);

void BM_ArmAllByScan(benchmark::State& state) {
  for (auto _ : state) {
    Bench bench(DirtyLogMode::kUffdAsync);
    Time(state, [&] { ArmByScan(state, bench, {0, kPages}); });
  }
}
BENCHMARK(BM_ArmAllByScan)->UseManualTime()->Iterations(5)->Unit(benchmark::kMicrosecond);

void BM_ArmAll(benchmark::State& state) {
  for (auto _ : state) {
    Bench bench(kModes[state.range(0)]);  // a new guest: no page is protected yet
    Time(state, [&] { Require(bench.log->Arm({{0, kPages}})); });
    state.SetLabel(std::string(bench.log->name()));
  }
}
BENCHMARK(BM_ArmAll)->Arg(0)->Arg(1)->UseManualTime()->Iterations(5)->Unit(benchmark::kMicrosecond);

// What a guest pays: the first write to an armed page, seen from inside it, with the command's
// round trip; the difference between armed and not is the fault.
void BM_GuestWrites(benchmark::State& state) {
  Bench bench(kModes[state.range(0)]);
  for (auto _ : state) {
    if (state.range(1) != 0) Require(bench.log->Arm({{0, 4096}}));
    Time(state, [&] { bench.guest.Do(GUEST_STORE, 0, 0, 4096); });
  }
  state.SetLabel(std::string(bench.log->name()) +
                 (state.range(1) != 0 ? ", armed" : ", not armed"));
  state.counters["s_per_page"] = benchmark::Counter(
      4096.0, benchmark::Counter::kIsIterationInvariantRate | benchmark::Counter::kInvert);
}
BENCHMARK(BM_GuestWrites)->ArgsProduct({{0, 1}, {0, 1}})->UseManualTime()->Iterations(20);

}  // namespace
}  // namespace presync
