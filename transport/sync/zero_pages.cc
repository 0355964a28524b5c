#include "transport/sync/zero_pages.h"

#include <cstdint>
#include <cstring>

#include "predictor/bitmap.h"

namespace presync {
namespace {

// A page that is zero in its first 16 bytes and equal to itself shifted by 16 is zero throughout;
// memcmp is the fastest walk that libc has for every CPU.
bool IsZeroPage(const std::byte* page) {
  constexpr size_t kHead = 16;
  static constexpr std::byte kZero[kHead] = {};
  return std::memcmp(page, kZero, kHead) == 0 &&
         std::memcmp(page, page + kHead, kPageBytes - kHead) == 0;
}

}  // namespace

PageStretch NextZeroOrDataPages(absl::Span<const std::byte> bytes) {
  const auto total = static_cast<PageCount>(bytes.size() / kPageBytes);
  PageStretch stretch = {.zero = IsZeroPage(bytes.data()), .pages = 1};
  while (stretch.pages < total &&
         IsZeroPage(bytes.data() + PagesToBytes(stretch.pages)) == stretch.zero) {
    ++stretch.pages;
  }
  return stretch;
}

void AppendZeroPages(absl::Span<const std::byte> bytes, PageIndex first,
                     std::vector<PageRun>* out) {
  constexpr PageCount kAhead = 16;  // the processor does not fetch across pages by itself
  const auto total = static_cast<PageCount>(bytes.size() / kPageBytes);
  for (PageCount page = 0; page < total; ++page) {
    if (page + kAhead < total) __builtin_prefetch(bytes.data() + PagesToBytes(page + kAhead));
    if (IsZeroPage(bytes.data() + PagesToBytes(page))) AppendRun({first + page, 1}, out);
  }
}

}  // namespace presync
