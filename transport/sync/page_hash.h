// Hashes of guest memory, so that two hosts can compare it without sending it.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/types/span.h"
#include "predictor/page.h"
#include "transport/memory.h"

namespace presync {

inline constexpr size_t kHashBytes = 16;

// What to hash: `run` is cut into ranges of `pages_per_hash` pages, numbered from 0; the last may
// be shorter. `only` picks some of them, ascending; if it is empty all are meant. A value.
struct HashPlan {
  PageRun run;
  PageCount pages_per_hash = 1;
  std::vector<uint32_t> only;

  // How many ranges `run` has. Precondition for this and the next ones: pages_per_hash is above 0.
  uint64_t ranges() const { return (uint64_t{run.count} + pages_per_hash - 1) / pages_per_hash; }
  // How many hashes the plan asks for, and the range of the index-th of them.
  uint64_t hashes() const { return only.empty() ? ranges() : only.size(); }
  PageRun RangeOf(size_t index) const;
};

// The plan that asks for a hash of each page of `pages`, which is ascending and not empty.
HashPlan PlanForPages(absl::Span<const PageIndex> pages);

// The holes within `run`, by whichever way of asking costs less. Errors as GuestMemory::Holes.
absl::StatusOr<std::vector<PageRun>> HolesOf(const GuestMemory& memory, PageRun run);

// XXH3-128, canonical form, of each range of `plan`, one after another. Holes count as the zeros
// that they read as, and stay holes. Uses up to four threads and blocks until done.
// INVALID_ARGUMENT: the run is empty or outside the memory, pages_per_hash is 0, or `only` is not
// ascending or names ranges that are not there.
absl::StatusOr<std::string> HashPages(const GuestMemory& memory, const HashPlan& plan);

// Of `pages`, those whose bytes here do not have the hash that `hashes` gives, 16 bytes a page in
// the same order; as ascending runs. Does not ask for holes: one of them would be allocated. Uses
// up to four threads and blocks until done.
std::vector<PageRun> DifferingPages(const GuestMemory& memory, absl::Span<const PageIndex> pages,
                                    absl::string_view hashes);

// The ranges of `plan` whose hashes differ. Precondition: both have plan.hashes() hashes.
std::vector<PageRun> DifferingRanges(const HashPlan& plan, absl::string_view a,
                                     absl::string_view b);

}  // namespace presync
