// Picking the best pages by a small integer score without sorting.
#pragma once

#include <array>
#include <bit>
#include <cstdint>
#include <vector>

#include "absl/types/span.h"
#include "predictor/bitmap.h"
#include "predictor/page.h"

namespace presync {

// Walks `candidates` in address order and hands them on in batches; calls fetch(page) for each page
// of a batch before take(pages) gets them, so that their memory is on its way. Ends when take says
// false.
template <typename Fetch, typename Take>
void ForEachBatch(const PageBitmap& candidates, Fetch fetch, Take take) {
  std::array<PageIndex, 64> batch;
  size_t filled = 0;
  const absl::Span<const uint64_t> words = candidates.words();
  for (size_t word = 0; word < words.size(); ++word) {
    for (uint64_t bits = words[word]; bits != 0; bits &= bits - 1) {
      const PageIndex page = static_cast<PageIndex>(word * 64 + std::countr_zero(bits));
      fetch(page);
      batch[filled++] = page;
      if (filled < batch.size()) continue;
      if (!take(absl::MakeConstSpan(batch))) return;
      filled = 0;
    }
  }
  if (filled > 0) take(absl::MakeConstSpan(batch.data(), filled));
}

// Replaces `*chosen` by the `pages` candidates with the highest scores, ties by lowest address, as
// ascending maximal runs; by all of them if there are fewer. score(page) is below `classes`.
//
// Two walks in address order: the first counts the candidates of each class, which gives the class
// in which the last chosen page lies; the second takes all above it and fills up from it.
template <typename Fetch, typename Score>
void ChooseByScore(const PageBitmap& candidates, PageCount pages, uint32_t classes, Fetch fetch,
                   Score score, std::vector<PageRun>* chosen) {
  chosen->clear();
  if (pages == 0) return;
  if (pages >= candidates.count()) {
    candidates.AppendRunsWithin({0, candidates.size()}, chosen);
    return;
  }
  std::vector<PageCount> in_class(classes);
  ForEachBatch(candidates, fetch, [&](absl::Span<const PageIndex> batch) {
    for (PageIndex page : batch) ++in_class[score(page)];
    // In the bulk phase the best class alone is enough: no need to look at the rest of the guest.
    return in_class[classes - 1] < pages;
  });
  uint32_t last_class = classes - 1;
  PageCount from_last = pages;
  while (in_class[last_class] < from_last) from_last -= in_class[last_class--];

  PageCount above_last = pages - from_last;
  ForEachBatch(candidates, fetch, [&](absl::Span<const PageIndex> batch) {
    for (PageIndex page : batch) {
      const uint32_t page_class = score(page);
      if (page_class < last_class) continue;
      PageCount& left = page_class > last_class ? above_last : from_last;
      if (left == 0) continue;
      --left;
      AppendRun({page, 1}, chosen);
    }
    return above_last > 0 || from_last > 0;
  });
}

}  // namespace presync
