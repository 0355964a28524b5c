// The dirty log of Linux 5.19 to 6.6 (Debian 12's own kernel): a write to a protected page waits
// for the thread that the library runs inside QEMU; it marks the page in a bitmap shared with us
// and lets the write go on.
#pragma once

#include <cstdint>
#include <memory>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "qemu-glue/dirty_log/tracked_space.h"
#include "qemu-glue/plugin/glue_protocol.h"
#include "transport/dirty_log.h"

namespace presync {

// A bitmap that the thread inside QEMU writes: mapped, owned.
class SharedBitmap {
 public:
  // INVALID_ARGUMENT: the file behind `fd` is not one of `pages` pages.
  static absl::StatusOr<SharedBitmap> Map(int fd, PageCount pages);
  SharedBitmap(SharedBitmap&& other) noexcept;
  SharedBitmap& operator=(SharedBitmap&& other) = delete;
  ~SharedBitmap();

  // Returns once every write that was let through before the call is visible in the words.
  // DEADLINE_EXCEEDED: the thread inside QEMU stands still in the middle of its work.
  absl::Status AwaitBatch(absl::Time deadline) const;
  // UNAVAILABLE: the thread gave up.
  absl::Status health() const;

  size_t words() const { return words_; }
  uint64_t TakeWord(size_t index);
  void Clear(PageRun run);  // indices within the bitmap

 private:
  SharedBitmap() = default;
  uint64_t* word(size_t index) const;

  presync_glue_bitmap* header_ = nullptr;
  size_t file_bytes_ = 0;
  size_t words_ = 0;
};

// Peek costs a look at each word of 64 pages, plus work by written pages. It waits for the fault
// that is being handled just then (microseconds); if QEMU's threads stand still for 5 s (it was
// stopped by a signal or a debugger), Peek fails with UNAVAILABLE.
class UffdHandlerLog final : public DirtyLog {
 public:
  // INVALID_ARGUMENT: a segment's bitmap has another size than the segment.
  static absl::StatusOr<std::unique_ptr<UffdHandlerLog>> Create(TrackedSpace space);

  std::string_view name() const override { return "uffd-handler"; }
  absl::Status Peek(std::vector<PageRun>* written) override;
  absl::Status Arm(absl::Span<const PageRun> runs) override;

 private:
  UffdHandlerLog(TrackedSpace space, std::vector<SharedBitmap> bitmaps);
  absl::Status AwaitBatches() const;
  void TakeBits(size_t index, size_t begin, std::vector<PageRun>* written);

  TrackedSpace space_;
  std::vector<SharedBitmap> bitmaps_;  // one a segment
};

}  // namespace presync
