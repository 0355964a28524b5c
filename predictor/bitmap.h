// A set of pages, one bit each, made for runs: the predictor and the sessions think in runs of
// pages.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "absl/types/span.h"
#include "predictor/page.h"

namespace presync {

// Fixed size, count kept up to date. Cost: one bit a page; operations on runs work a 64-bit word at
// a time. Not thread-safe. Preconditions (CHECKed): runs end at or below size(), both sizes of a
// set operation are the same, max_pages is above 0. Test's page is below size() (not checked).
class PageBitmap {
 public:
  explicit PageBitmap(PageCount size, bool value = false);

  PageCount size() const { return size_; }
  PageCount count() const { return count_; }  // pages in the set, O(1)
  bool empty() const { return count_ == 0; }

  bool Test(PageIndex page) const { return (words_[page >> 6] >> (page & 63)) & 1; }
  // Set and Clear return how many pages changed.
  PageCount Set(PageRun run);
  PageCount Clear(PageRun run);
  void SetAll();
  void ClearAll();

  // Set algebra with a bitmap of the same size.
  void Or(const PageBitmap& other);
  void And(const PageBitmap& other);
  void AndNot(const PageBitmap& other);

  // The first maximal run of pages in the set, as if there were none below `from`, cut at
  // `max_pages`. So a walk goes on at the end of the last run. Nothing if `from` is at or above
  // size().
  std::optional<PageRun> NextRun(PageIndex from, PageCount max_pages = UINT32_MAX) const;

  // Appends the parts of `run` that are in the set, as maximal runs.
  void AppendRunsWithin(PageRun run, std::vector<PageRun>* out) const;

  // How many pages of `run` are in the set.
  PageCount CountWithin(PageRun run) const;

  // Bit i of word w is page 64 w + i; bits at and above size() are 0. For walks that must not pay a
  // call for each run.
  absl::Span<const uint64_t> words() const { return words_; }

  friend bool operator==(const PageBitmap&, const PageBitmap&) = default;

 private:
  template <typename Combine>
  void CombineWith(const PageBitmap& other, Combine combine);

  // The first page in [from, limit) whose bit is `value`; `limit` if there is none.
  uint64_t FindFrom(uint64_t from, uint64_t limit, bool value) const;

  PageCount size_;
  PageCount count_ = 0;
  std::vector<uint64_t> words_;  // bits at and above size_ are always 0
};

// Sum of the runs' lengths.
PageCount CountPages(absl::Span<const PageRun> runs);

// Adds `run` to an ascending list: joined to the last run when it begins where that one ends.
void AppendRun(PageRun run, std::vector<PageRun>* runs);

}  // namespace presync
