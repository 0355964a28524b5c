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

PageRun RangeAt(PageRun run, PageCount pages_per_hash, size_t index) {
  const PageIndex first = run.first + static_cast<PageIndex>(index * pages_per_hash);
  return {first, std::min(pages_per_hash, run.end() - first)};
}

}  // namespace

absl::StatusOr<std::string> HashPages(const GuestMemory& memory, PageRun run,
                                      PageCount pages_per_hash) {
  if (run.count == 0 || pages_per_hash == 0 || run.first >= memory.pages() ||
      run.count > memory.pages() - run.first) {
    return absl::InvalidArgumentError("hashes were asked for pages that the guest does not have");
  }
  const size_t ranges = (size_t{run.count} + pages_per_hash - 1) / pages_per_hash;
  std::string hashes(ranges * kHashBytes, '\0');
  const size_t workers =
      std::clamp<size_t>(std::thread::hardware_concurrency(), 1, std::min<size_t>(4, ranges));
  absl::StatusOr<std::vector<PageRun>> holes = memory.Holes(run);
  if (!holes.ok()) return holes.status();
  PageBitmap hole_pages(memory.pages());
  for (const PageRun& hole : *holes) hole_pages.Set(hole);
  std::vector<std::thread> threads;
  for (size_t w = 0; w < workers; ++w) {
    threads.emplace_back([&, w] {
      const std::unique_ptr<XXH3_state_t, HashStateDeleter> state(XXH3_createState());
      std::vector<PageRun> within;
      char zeros[kHashBytes];  // of a whole range: much of a guest's memory was never touched
      HashZeros(pages_per_hash, state.get(), zeros);
      for (size_t i = w; i < ranges; i += workers) {
        const PageRun range = RangeAt(run, pages_per_hash, i);
        within.clear();
        hole_pages.AppendRunsWithin(range, &within);
        if (CountPages(within) == pages_per_hash) {
          std::memcpy(&hashes[i * kHashBytes], zeros, kHashBytes);
          continue;
        }
        HashRange(memory, range, within, state.get(), &hashes[i * kHashBytes]);
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  return hashes;
}

std::vector<PageRun> DifferingRanges(PageRun run, PageCount pages_per_hash, absl::string_view a,
                                     absl::string_view b) {
  PRESYNC_CHECK(a.size() == b.size());
  std::vector<PageRun> differing;
  for (size_t i = 0; i * kHashBytes < a.size(); ++i) {
    if (a.substr(i * kHashBytes, kHashBytes) != b.substr(i * kHashBytes, kHashBytes)) {
      differing.push_back(RangeAt(run, pages_per_hash, i));
    }
  }
  return differing;
}

}  // namespace presync
