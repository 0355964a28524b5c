#include "predictor/bitmap.h"

#include <algorithm>
#include <bit>

#include "predictor/check.h"

namespace presync {
namespace {

// The bits of word `word` that belong to pages in [first, end); the word must hold at least one of
// them.
uint64_t WordMask(size_t word, uint64_t first, uint64_t end) {
  const uint64_t base = uint64_t{word} << 6;
  uint64_t mask = ~uint64_t{0};
  if (first > base) mask &= ~uint64_t{0} << (first - base);
  if (end < base + 64) mask &= ~uint64_t{0} >> (base + 64 - end);
  return mask;
}

// Calls visit(word, mask) for each word that `run` touches. Ends are 64-bit: a run may end at 2^32
// - 1.
template <typename Visit>
void ForEachWord(PageRun run, PageCount size, Visit visit) {
  PRESYNC_CHECK(run.first <= size && run.count <= size - run.first);
  if (run.count == 0) return;
  const uint64_t first = run.first;
  const uint64_t end = first + run.count;
  for (size_t word = first >> 6; word <= (end - 1) >> 6; ++word) {
    visit(word, WordMask(word, first, end));
  }
}

}  // namespace

PageBitmap::PageBitmap(PageCount size, bool value)
    : size_(size), words_((uint64_t{size} + 63) >> 6) {
  if (value) SetAll();
}

PageCount PageBitmap::Set(PageRun run) {
  PageCount changed = 0;
  ForEachWord(run, size_, [&](size_t word, uint64_t mask) {
    changed += std::popcount(mask & ~words_[word]);
    words_[word] |= mask;
  });
  count_ += changed;
  return changed;
}

PageCount PageBitmap::Clear(PageRun run) {
  PageCount changed = 0;
  ForEachWord(run, size_, [&](size_t word, uint64_t mask) {
    changed += std::popcount(mask & words_[word]);
    words_[word] &= ~mask;
  });
  count_ -= changed;
  return changed;
}

void PageBitmap::SetAll() {
  std::fill(words_.begin(), words_.end(), ~uint64_t{0});
  if (size_ % 64 != 0) words_.back() = ~uint64_t{0} >> (64 - size_ % 64);
  count_ = size_;
}

void PageBitmap::ClearAll() {
  std::fill(words_.begin(), words_.end(), 0);
  count_ = 0;
}

template <typename Combine>
void PageBitmap::CombineWith(const PageBitmap& other, Combine combine) {
  PRESYNC_CHECK(size_ == other.size_);
  count_ = 0;
  for (size_t word = 0; word < words_.size(); ++word) {
    words_[word] = combine(words_[word], other.words_[word]);
    count_ += std::popcount(words_[word]);
  }
}

void PageBitmap::Or(const PageBitmap& other) {
  CombineWith(other, [](uint64_t a, uint64_t b) { return a | b; });
}

void PageBitmap::And(const PageBitmap& other) {
  CombineWith(other, [](uint64_t a, uint64_t b) { return a & b; });
}

void PageBitmap::AndNot(const PageBitmap& other) {
  CombineWith(other, [](uint64_t a, uint64_t b) { return a & ~b; });
}

uint64_t PageBitmap::FindFrom(uint64_t from, uint64_t limit, bool value) const {
  for (uint64_t at = from; at < limit; at = (at | 63) + 1) {
    const uint64_t word = value ? words_[at >> 6] : ~words_[at >> 6];
    const uint64_t rest = word >> (at & 63);
    if (rest != 0) return std::min<uint64_t>(at + std::countr_zero(rest), limit);
  }
  return limit;
}

std::optional<PageRun> PageBitmap::NextRun(PageIndex from, PageCount max_pages) const {
  PRESYNC_CHECK(max_pages > 0);
  if (from >= size_ || count_ == 0) return std::nullopt;
  const uint64_t first = FindFrom(from, size_, true);
  if (first == size_) return std::nullopt;
  const uint64_t end = FindFrom(first, std::min<uint64_t>(size_, first + max_pages), false);
  return PageRun{static_cast<PageIndex>(first), static_cast<PageCount>(end - first)};
}

void PageBitmap::AppendRunsWithin(PageRun run, std::vector<PageRun>* out) const {
  PRESYNC_CHECK(run.first <= size_ && run.count <= size_ - run.first);
  const uint64_t limit = run.end();
  uint64_t first = FindFrom(run.first, limit, true);
  while (first < limit) {
    const uint64_t end = FindFrom(first, limit, false);
    out->push_back({static_cast<PageIndex>(first), static_cast<PageCount>(end - first)});
    first = FindFrom(end, limit, true);
  }
}

PageCount PageBitmap::CountWithin(PageRun run) const {
  PageCount count = 0;
  ForEachWord(run, size_,
              [&](size_t word, uint64_t mask) { count += std::popcount(mask & words_[word]); });
  return count;
}

PageCount CountPages(absl::Span<const PageRun> runs) {
  PageCount count = 0;
  for (const PageRun& run : runs) count += run.count;
  return count;
}

void AppendRun(PageRun run, std::vector<PageRun>* runs) {
  if (run.count == 0) return;
  if (!runs->empty() && runs->back().end() == run.first) {
    runs->back().count += run.count;
  } else {
    runs->push_back(run);
  }
}

}  // namespace presync
