// Zero pages travel without payload.
#pragma once

#include <cstddef>

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

}  // namespace presync
