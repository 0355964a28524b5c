// What the two userfaultfd logs have in common: the pages of a guest, where they lie in QEMU, the
// descriptors to protect them with, and which are armed.
#pragma once

#include <optional>
#include <vector>

#include "absl/status/status.h"
#include "absl/time/time.h"
#include "absl/types/span.h"
#include "predictor/bitmap.h"
#include "predictor/page.h"
#include "qemu-glue/dirty_log/glue_client.h"
#include "qemu-glue/dirty_log/guest_maps.h"
#include "qemu-glue/dirty_log/guest_process.h"

namespace presync {

struct TrackedSegment {
  Segment segment;
  GlueRange range;
};

// Not thread-safe. Movable.
class TrackedSpace {
 public:
  // Precondition: `segments` ascend and cover [0, total pages) without gaps.
  TrackedSpace(GuestProcess process, std::vector<TrackedSegment> segments);

  // Keeps the connection for as long as the space lives, so that no other presyncd takes over.
  void Hold(GlueClient connection) { connection_ = std::move(connection); }

  const GuestProcess& process() const { return process_; }
  absl::Span<const TrackedSegment> segments() const { return segments_; }
  const PageBitmap& armed() const { return armed_; }

  // INVALID_ARGUMENT: a run is empty, outside the guest's memory or crosses a region.
  absl::Status Validate(absl::Span<const PageRun> runs) const;

  // Calls `visit(index of segment, part of run within it)` for the parts of a valid run.
  template <typename Visitor>
  absl::Status ForEachPart(PageRun run, Visitor visit) const {
    for (size_t i = SegmentOf(run.first); run.count > 0; ++i) {
      const PageCount within = segments_[i].segment.run.end() - run.first;
      const PageRun part = {run.first, run.count < within ? run.count : within};
      const absl::Status status = visit(i, part);
      if (!status.ok()) return status;
      run = {part.end(), run.count - part.count};
    }
    return absl::OkStatus();
  }

  // Write-protects the pages of valid runs in QEMU, then counts them as armed. UNAVAILABLE: it
  // failed.
  absl::Status ProtectAndArm(absl::Span<const PageRun> runs);

  // The pages of `written` that are armed become unarmed and are appended to *out, joined with its
  // last run, if that is at or after index `begin`, adjacent and of the same region. Calls must
  // ascend.
  void Take(PageRun written, size_t begin, std::vector<PageRun>* out);

  // UNAVAILABLE: QEMU has ended.
  absl::Status CheckAlive() const { return process_.CheckAlive(segments_.front().segment.address); }

 private:
  size_t SegmentOf(PageIndex page) const;

  GuestProcess process_;
  std::vector<TrackedSegment> segments_;
  PageBitmap armed_;
  std::vector<PageRun> scratch_;
  std::optional<GlueClient> connection_;
};

// How long QEMU's address space may go on changing (it forks, or discards memory) until a page's
// protection is given up. That takes QEMU milliseconds; one that asked for events of it, and does
// not read them, has it changing for ever.
inline constexpr absl::Duration kAddressSpacePatience = absl::Seconds(2);

// UFFDIO_WRITEPROTECT on [address, address + bytes). UNAVAILABLE: QEMU has ended or unmapped the
// memory, or its address space does not come to rest.
absl::Status ProtectMemory(int uffd, uint64_t address, uint64_t bytes, bool protect);

}  // namespace presync
