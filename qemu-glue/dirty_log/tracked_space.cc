#include "qemu-glue/dirty_log/tracked_space.h"

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "qemu-glue/plugin/kernel_abi.h"
#include "transport/clock.h"

namespace presync {
namespace {

constexpr absl::Duration kLookAgain = absl::Microseconds(50);  // a discard takes about as long

}  // namespace

absl::Status ProtectMemory(int uffd, uint64_t address, uint64_t bytes, bool protect) {
  uffdio_writeprotect request = {};
  request.range.start = address;
  request.range.len = bytes;
  request.mode = protect ? UFFDIO_WRITEPROTECT_MODE_WP : 0;
  absl::Time give_up_at = absl::InfiniteFuture();
  while (::ioctl(uffd, UFFDIO_WRITEPROTECT, &request) != 0) {
    const int error = errno;
    if (error == EAGAIN || error == EINTR) {
      const absl::Time now = MonotonicNow();
      if (give_up_at == absl::InfiniteFuture()) give_up_at = now + kAddressSpacePatience;
      if (now < give_up_at) {
        absl::SleepFor(kLookAgain);
        continue;
      }
    }
    const char* const cause = error == ESRCH    ? "QEMU's process has ended"
                              : error == ENOENT ? "QEMU has unmapped it, or it is tracked no longer"
                              : error == EAGAIN ? "QEMU's address space does not come to rest"
                                                : std::strerror(error);
    return absl::UnavailableError(
        absl::StrCat("write-protecting ", bytes, " bytes of guest RAM: ", cause));
  }
  return absl::OkStatus();
}

TrackedSpace::TrackedSpace(GuestProcess process, std::vector<TrackedSegment> segments)
    : process_(std::move(process)),
      segments_(std::move(segments)),
      armed_(segments_.back().segment.run.end()) {}

size_t TrackedSpace::SegmentOf(PageIndex page) const {
  const auto after = std::upper_bound(
      segments_.begin(), segments_.end(), page,
      [](PageIndex p, const TrackedSegment& s) { return p < s.segment.run.first; });
  return static_cast<size_t>(after - segments_.begin()) - 1;
}

absl::Status TrackedSpace::Validate(absl::Span<const PageRun> runs) const {
  const PageCount pages = armed_.size();
  for (const PageRun& run : runs) {
    if (run.count == 0 || run.first >= pages || run.count > pages - run.first) {
      return absl::InvalidArgumentError(absl::StrCat("arming pages ", run.first, " +", run.count,
                                                     ": the guest has ", pages, " pages"));
    }
    if (segments_[SegmentOf(run.first)].segment.region_first !=
        segments_[SegmentOf(run.end() - 1)].segment.region_first) {
      return absl::InvalidArgumentError(
          absl::StrCat("arming pages ", run.first, " +", run.count, ": the run crosses a region"));
    }
  }
  return absl::OkStatus();
}

absl::Status TrackedSpace::ProtectAndArm(absl::Span<const PageRun> runs) {
  for (const PageRun& run : runs) {
    const absl::Status status = ForEachPart(run, [this](size_t index, PageRun part) {
      const TrackedSegment& s = segments_[index];
      return ProtectMemory(s.range.uffd.get(), s.segment.AddressOf(part.first),
                           PagesToBytes(part.count), true);
    });
    if (!status.ok()) return status;
    armed_.Set(run);
  }
  return absl::OkStatus();
}

void TrackedSpace::Take(PageRun written, size_t begin, std::vector<PageRun>* out) {
  scratch_.clear();
  armed_.AppendRunsWithin(written, &scratch_);
  for (const PageRun& run : scratch_) {
    armed_.Clear(run);
    const bool starts_region = segments_[SegmentOf(run.first)].segment.region_first == run.first;
    if (out->size() > begin && out->back().end() == run.first && !starts_region) {
      out->back().count += run.count;
    } else {
      out->push_back(run);
    }
  }
}

}  // namespace presync
