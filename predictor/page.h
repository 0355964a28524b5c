// The units everything is counted in. Pages and bytes never share an integer type: a page index or
// a page count has 32 bits (16 TiB of guest RAM), a byte count has 64.
#pragma once

#include <cstdint>

namespace presync {

// Index of a page in the guest's flat page space: all regions of a guest one after another.
using PageIndex = uint32_t;
using PageCount = uint32_t;

inline constexpr uint64_t kPageBytes = 4096;

constexpr uint64_t PagesToBytes(PageCount pages) { return uint64_t{pages} * kPageBytes; }

// `count` pages from `first` on. Runs in a list ascend and do not overlap unless said otherwise.
struct PageRun {
  PageIndex first = 0;
  PageCount count = 0;

  constexpr PageIndex end() const { return first + count; }
  friend bool operator==(const PageRun&, const PageRun&) = default;
};

}  // namespace presync
