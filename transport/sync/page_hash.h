// Hashes of guest memory, so that two hosts can compare it without sending it.
#pragma once

#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "predictor/page.h"
#include "transport/memory.h"

namespace presync {

inline constexpr size_t kHashBytes = 16;

// XXH3-128, canonical form, of `run` cut into ranges of `pages_per_hash` pages (the last may be
// shorter), one after another. Holes count as the zeros that they read as, and stay holes. Uses up
// to four threads and blocks until done. INVALID_ARGUMENT: the run is empty or outside the memory,
// or pages_per_hash is 0.
absl::StatusOr<std::string> HashPages(const GuestMemory& memory, PageRun run,
                                      PageCount pages_per_hash);

// The ranges of `run` whose hashes differ, as page runs. Precondition: equal lengths.
std::vector<PageRun> DifferingRanges(PageRun run, PageCount pages_per_hash, absl::string_view a,
                                     absl::string_view b);

}  // namespace presync
