// What do unsettled pages cost a launch? (docs/design.md, "Reads under way")
//
// 10,000 pages, scattered over 1 GiB so that no cache holds them, are compared with hashes that the
// target gave ahead: that is what the guest stands still for. Beside it, on one thread, a plain
// loop that only reads the same pages.
#include <benchmark/benchmark.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "predictor/check.h"
#include "tests/transport/scratch_memory.h"
#include "transport/sync/page_hash.h"

namespace presync {
namespace {

constexpr PageCount kPages = 1 << 18;

// Memory with content, the hash of each page, and a fresh choice of pages for every turn.
class Fixture {
 public:
  Fixture() {
    absl::StatusOr<std::unique_ptr<ScratchMemory>> scratch = ScratchMemory::Create({kPages});
    PRESYNC_CHECK(scratch.ok());
    scratch_ = *std::move(scratch);
    for (PageIndex page = 0; page < kPages; ++page) scratch_->FillPage(page, page + 1);
    for (PageIndex first = 0; first < kPages; first += kPages / 16) {
      absl::StatusOr<std::string> some =
          HashPages(memory(), {.run = {first, kPages / 16}, .pages_per_hash = 1, .only = {}});
      PRESYNC_CHECK(some.ok());
      hashes_ += *some;
    }
  }

  const GuestMemory& memory() const { return scratch_->memory(); }

  void Choose(int64_t count, std::vector<PageIndex>* pages, std::string* hashes) {
    pages->clear();
    hashes->clear();
    while (static_cast<int64_t>(pages->size()) < count) {
      pages->push_back(static_cast<PageIndex>(random_() % kPages));
      if (static_cast<int64_t>(pages->size()) < count) continue;
      std::sort(pages->begin(), pages->end());
      pages->erase(std::unique(pages->begin(), pages->end()), pages->end());
    }
    for (const PageIndex page : *pages) hashes->append(hashes_, page * kHashBytes, kHashBytes);
  }

 private:
  std::unique_ptr<ScratchMemory> scratch_;
  std::string hashes_;
  std::mt19937 random_{1};
};

Fixture& TheFixture() {
  static Fixture* const fixture = new Fixture;
  return *fixture;
}

// Times `work(pages, hashes)`, each time with other pages.
template <typename Work>
void Time(benchmark::State& state, const Work& work) {
  std::vector<PageIndex> pages;
  std::string hashes;
  for (auto _ : state) {
    state.PauseTiming();
    TheFixture().Choose(state.range(0), &pages, &hashes);
    state.ResumeTiming();
    work(pages, hashes);
  }
}

void CompareAtStandstill(benchmark::State& state) {
  Time(state, [](const std::vector<PageIndex>& pages, const std::string& hashes) {
    PRESYNC_CHECK(DifferingPages(TheFixture().memory(), pages, hashes).empty());
  });
}
BENCHMARK(CompareAtStandstill)
    ->Arg(1'000)
    ->Arg(10'000)
    ->UseRealTime()
    ->Unit(benchmark::kMillisecond);

void BaselineReadThem(benchmark::State& state) {
  Time(state, [](const std::vector<PageIndex>& pages, const std::string&) {
    uint64_t sum = 0;
    for (const PageIndex page : pages) {
      const std::byte* const bytes = TheFixture().memory().Bytes({page, 1}).data();
      for (size_t i = 0; i < kPageBytes; i += sizeof(uint64_t)) {
        uint64_t word;
        std::memcpy(&word, bytes + i, sizeof(word));
        sum += word;
      }
    }
    benchmark::DoNotOptimize(sum);
  });
}
BENCHMARK(BaselineReadThem)->Arg(1'000)->Arg(10'000)->UseRealTime()->Unit(benchmark::kMillisecond);

}  // namespace
}  // namespace presync
