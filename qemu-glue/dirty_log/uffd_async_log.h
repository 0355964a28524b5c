// The dirty log of Linux 6.7 and newer: the kernel lifts a page's protection at its first write and
// remembers; PAGEMAP_SCAN reads it from outside QEMU.
#pragma once

#include <memory>
#include <string_view>
#include <vector>

#include "qemu-glue/dirty_log/tracked_space.h"
#include "qemu-glue/plugin/kernel_abi.h"
#include "transport/dirty_log.h"

namespace presync {

// Peek is one walk of the kernel over the page tables from the first armed page on, plus work by
// runs of written pages; it allocates nothing once it has run.
class UffdAsyncLog final : public DirtyLog {
 public:
  static std::unique_ptr<UffdAsyncLog> Create(TrackedSpace space);

  std::string_view name() const override { return "uffd-async"; }
  absl::Status Peek(std::vector<PageRun>* written) override;
  absl::Status Arm(absl::Span<const PageRun> runs) override;

 private:
  explicit UffdAsyncLog(TrackedSpace space);
  absl::Status ScanSegment(const Segment& segment, size_t begin, std::vector<PageRun>* written);
  absl::Status CheckMapped(const Segment& segment);

  TrackedSpace space_;
  std::vector<page_region> found_;  // reused by every scan
};

}  // namespace presync
