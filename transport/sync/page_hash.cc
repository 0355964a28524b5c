#include "transport/sync/page_hash.h"

#include <xxhash.h>
// After it: the same functions, by what the processor can do.
#include <xxh_x86dispatch.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <thread>

#include "predictor/bitmap.h"
#include "predictor/check.h"

namespace presync {
namespace {

constexpr std::byte kZeroPage[kPageBytes] = {};

// Up to here asking for the holes page by page (0.3 us each) costs less than a walk, which goes on
// to the next hole beyond the run, in the worst case through all of a large guest.
constexpr PageCount kShortRun = 8192;
// And where few pages of a long run are asked for: a walk costs 50 ns for each that it passes.
constexpr uint64_t kWalkedPagesPerQuestion = 6;

// Work is not worth a thread below this: starting one takes some 30 us.
constexpr size_t kLeastPagesPerThread = 128;

struct HashStateDeleter {
  void operator()(XXH3_state_t* state) const { XXH3_freeState(state); }
};

void StoreHash(XXH128_hash_t hash, char* out) {
  XXH128_canonical_t canonical;
  XXH128_canonicalFromHash(&canonical, hash);
  std::memcpy(out, canonical.digest, kHashBytes);
}

// Calls work(0), ..., work(workers - 1), each in a thread of its own.
template <typename Work>
void RunInThreads(size_t workers, const Work& work) {
  std::vector<std::thread> others;
  for (size_t w = 1; w < workers; ++w) others.emplace_back(work, w);
  work(0);
  for (std::thread& thread : others) thread.join();
}

// The processor does not look ahead from one page to another that lies elsewhere.
void PrefetchPage(const std::byte* page) {
  constexpr size_t kCacheLineBytes = 64;
  for (size_t i = 0; i < kPageBytes; i += kCacheLineBytes) __builtin_prefetch(page + i);
}

size_t Workers(size_t most) {
  static const size_t processors =
      std::thread::hardware_concurrency();  // it reads a file each time
  return std::clamp<size_t>(processors, 1, std::clamp<size_t>(most, 1, 4));
}

// The hash of `pages` zero pages.
void HashZeros(PageCount pages, XXH3_state_t* state, char* out) {
  XXH3_128bits_reset(state);
  for (PageCount i = 0; i < pages; ++i) XXH3_128bits_update(state, kZeroPage, kPageBytes);
  StoreHash(XXH3_128bits_digest(state), out);
}

// Hashes one range into `out`. `holes` has those within it.
void HashRange(const GuestMemory& memory, PageRun range, absl::Span<const PageRun> holes,
               XXH3_state_t* state, char* out) {
  XXH3_128bits_reset(state);
  const auto add_bytes = [&](PageRun run) {
    for (const PageRun& piece : memory.SplitAtRegions(run)) {
      const absl::Span<const std::byte> bytes = memory.Bytes(piece);
      XXH3_128bits_update(state, bytes.data(), bytes.size());
    }
  };
  PageIndex next = range.first;
  for (const PageRun& hole : holes) {
    if (hole.first > next) add_bytes({next, hole.first - next});
    for (PageCount i = 0; i < hole.count; ++i) XXH3_128bits_update(state, kZeroPage, kPageBytes);
    next = hole.end();
  }
  if (range.end() > next) add_bytes({next, range.end() - next});
  StoreHash(XXH3_128bits_digest(state), out);
}

absl::Status CheckPlan(const GuestMemory& memory, const HashPlan& plan) {
  const PageRun run = plan.run;
  if (run.count == 0 || plan.pages_per_hash == 0 || run.first >= memory.pages() ||
      run.count > memory.pages() - run.first) {
    return absl::InvalidArgumentError("hashes were asked for pages that the guest does not have");
  }
  const auto not_ascending = std::adjacent_find(plan.only.begin(), plan.only.end(),
                                                [](uint32_t a, uint32_t b) { return a >= b; });
  if (not_ascending != plan.only.end() ||
      (!plan.only.empty() && plan.only.back() >= plan.ranges())) {
    return absl::InvalidArgumentError("hashes were asked for ranges that are not there");
  }
  return absl::OkStatus();
}

// The holes among the ranges that `plan` picks; others of its run may be among them.
absl::StatusOr<std::vector<PageRun>> HolesOf(const GuestMemory& memory, const HashPlan& plan) {
  const uint64_t picked = plan.only.size() * uint64_t{plan.pages_per_hash};
  if (picked == 0 || picked * kWalkedPagesPerQuestion > plan.run.count) {
    return HolesOf(memory, plan.run);
  }
  std::vector<PageRun> runs, holes;
  for (size_t i = 0; i < plan.only.size(); ++i) AppendRun(plan.RangeOf(i), &runs);
  for (const PageRun& run : runs) {
    const absl::StatusOr<std::vector<PageRun>> some = memory.RecheckHoles(run);
    if (!some.ok()) return some.status();
    for (const PageRun& hole : *some) AppendRun(hole, &holes);
  }
  return holes;
}

}  // namespace

PageRun HashPlan::RangeOf(size_t index) const {
  const uint64_t range = only.empty() ? index : only[index];
  const PageIndex first = run.first + static_cast<PageIndex>(range * pages_per_hash);
  return {first, std::min(pages_per_hash, run.end() - first)};
}

absl::StatusOr<std::vector<PageRun>> HolesOf(const GuestMemory& memory, PageRun run) {
  return run.count <= kShortRun ? memory.RecheckHoles(run) : memory.Holes(run);
}

HashPlan PlanForPages(absl::Span<const PageIndex> pages) {
  HashPlan plan = {.run = {pages.front(), pages.back() - pages.front() + 1},
                   .pages_per_hash = 1,
                   .only = {pages.begin(), pages.end()}};
  for (uint32_t& page : plan.only) page -= plan.run.first;
  return plan;
}

absl::StatusOr<std::string> HashPages(const GuestMemory& memory, const HashPlan& plan) {
  if (absl::Status s = CheckPlan(memory, plan); !s.ok()) return s;
  absl::StatusOr<std::vector<PageRun>> holes = HolesOf(memory, plan);
  if (!holes.ok()) return holes.status();
  const PageIndex base = plan.run.first;  // of the bitmap, which has no more than the run
  PageBitmap hole_pages(plan.run.count);
  for (const PageRun& hole : *holes) hole_pages.Set({hole.first - base, hole.count});
  const size_t hashes = plan.hashes();
  std::string result(hashes * kHashBytes, '\0');
  const size_t workers = Workers(hashes);
  const auto work = [&](size_t first) {
    const std::unique_ptr<XXH3_state_t, HashStateDeleter> state(XXH3_createState());
    std::vector<PageRun> within;
    char zeros[kHashBytes];  // of a whole range: much of a guest's memory was never touched
    // The other side chose pages_per_hash, and no range is longer than the run.
    HashZeros(std::min(plan.pages_per_hash, plan.run.count), state.get(), zeros);
    for (size_t i = first; i < hashes; i += workers) {
      const PageRun range = plan.RangeOf(i);
      within.clear();
      hole_pages.AppendRunsWithin({range.first - base, range.count}, &within);
      for (PageRun& hole : within) hole.first += base;
      char* const out = &result[i * kHashBytes];
      if (CountPages(within) == plan.pages_per_hash) {
        std::memcpy(out, zeros, kHashBytes);
      } else {
        HashRange(memory, range, within, state.get(), out);
      }
    }
  };
  RunInThreads(workers, work);
  return result;
}

std::vector<PageRun> DifferingPages(const GuestMemory& memory, absl::Span<const PageIndex> pages,
                                    absl::string_view hashes) {
  PRESYNC_CHECK(hashes.size() == pages.size() * kHashBytes);
  const size_t workers = Workers(pages.size() / kLeastPagesPerThread);
  std::vector<std::vector<PageRun>> differing(workers);
  RunInThreads(workers, [&](size_t w) {
    const size_t end = pages.size() * (w + 1) / workers;
    for (size_t i = pages.size() * w / workers; i < end; ++i) {
      const PageRun page = {pages[i], 1};
      if (i + 1 < end) PrefetchPage(memory.Bytes({pages[i + 1], 1}).data());
      char ours[kHashBytes];
      StoreHash(XXH3_128bits(memory.Bytes(page).data(), kPageBytes), ours);
      if (std::memcmp(ours, &hashes[i * kHashBytes], kHashBytes) != 0) {
        AppendRun(page, &differing[w]);
      }
    }
  });
  std::vector<PageRun> all;
  for (const std::vector<PageRun>& some : differing) {
    for (const PageRun& run : some) AppendRun(run, &all);
  }
  return all;
}

std::vector<PageRun> DifferingRanges(const HashPlan& plan, absl::string_view a,
                                     absl::string_view b) {
  PRESYNC_CHECK(a.size() == b.size() && a.size() == plan.hashes() * kHashBytes);
  std::vector<PageRun> differing;
  for (size_t i = 0; i * kHashBytes < a.size(); ++i) {
    if (a.substr(i * kHashBytes, kHashBytes) != b.substr(i * kHashBytes, kHashBytes)) {
      differing.push_back(plan.RangeOf(i));
    }
  }
  return differing;
}

}  // namespace presync
