#include "transport/sync/page_hash.h"

#include <xxhash.h>

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

struct HashStateDeleter {
  void operator()(XXH3_state_t* state) const { XXH3_freeState(state); }
};

void StoreHash(const XXH3_state_t* state, char* out) {
  XXH128_canonical_t canonical;
  XXH128_canonicalFromHash(&canonical, XXH3_128bits_digest(state));
  std::memcpy(out, canonical.digest, kHashBytes);
}

// The hash of `pages` zero pages.
void HashZeros(PageCount pages, XXH3_state_t* state, char* out) {
  XXH3_128bits_reset(state);
  for (PageCount i = 0; i < pages; ++i) XXH3_128bits_update(state, kZeroPage, kPageBytes);
  StoreHash(state, out);
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
  StoreHash(state, out);
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

}  // namespace

PageRun HashPlan::RangeOf(size_t index) const {
  const uint64_t range = only.empty() ? index : only[index];
  const PageIndex first = run.first + static_cast<PageIndex>(range * pages_per_hash);
  return {first, std::min(pages_per_hash, run.end() - first)};
}

absl::StatusOr<std::vector<PageRun>> HolesOf(const GuestMemory& memory, PageRun run) {
  return run.count <= kShortRun ? memory.RecheckHoles(run) : memory.Holes(run);
}

absl::StatusOr<std::string> HashPages(const GuestMemory& memory, const HashPlan& plan) {
  if (absl::Status s = CheckPlan(memory, plan); !s.ok()) return s;
  absl::StatusOr<std::vector<PageRun>> holes = HolesOf(memory, plan.run);
  if (!holes.ok()) return holes.status();
  const PageIndex base = plan.run.first;  // of the bitmap, which has no more than the run
  PageBitmap hole_pages(plan.run.count);
  for (const PageRun& hole : *holes) hole_pages.Set({hole.first - base, hole.count});
  const size_t hashes = plan.hashes();
  std::string result(hashes * kHashBytes, '\0');
  const size_t workers =
      std::clamp<size_t>(std::thread::hardware_concurrency(), 1, std::min<size_t>(4, hashes));
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
  std::vector<std::thread> others;
  for (size_t w = 1; w < workers; ++w) others.emplace_back(work, w);
  work(0);
  for (std::thread& thread : others) thread.join();
  return result;
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
