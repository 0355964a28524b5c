// Zero pages travel without payload.
#pragma once

#include <cstddef>
#include <vector>

#include "absl/types/span.h"
#include "predictor/page.h"

namespace presync {

struct PageStretch {
  bool zero = false;
  PageCount pages = 0;
};

// How many pages at the front of `bytes` are alike: all zero, or all not. `bytes` is a whole,
// positive number of pages. The guest may be writing to them: the answer is then as good as the
// caller's arming.
PageStretch NextZeroOrDataPages(absl::Span<const std::byte> bytes);

// Appends the pages of `bytes` that are zero, as ascending runs; the first page of `bytes` has the
// index `first`. Meant for much memory of which little is zero: some 20 ns a page.
void AppendZeroPages(absl::Span<const std::byte> bytes, PageIndex first, std::vector<PageRun>* out);

}  // namespace presync
