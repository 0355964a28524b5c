#include "qemu-glue/dirty_log/uffd_handler_log.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>

#include <algorithm>
#include <atomic>
#include <bit>
#include <cerrno>
#include <cstring>
#include <utility>

#include "absl/memory/memory.h"
#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "transport/clock.h"

namespace presync {
namespace {

constexpr absl::Duration kStandstill = absl::Seconds(5);

// The bits of [from, to) within one word.
uint64_t MaskOf(unsigned from, unsigned to) {
  const uint64_t below_to = to == 64 ? ~uint64_t{0} : (uint64_t{1} << to) - 1;
  return below_to & ~((uint64_t{1} << from) - 1);
}

}  // namespace

absl::StatusOr<SharedBitmap> SharedBitmap::Map(int fd, PageCount pages) {
  SharedBitmap bitmap;
  bitmap.words_ = (size_t{pages} + 63) / 64;
  const size_t needed = PRESYNC_GLUE_BITMAP_OFFSET + bitmap.words_ * sizeof(uint64_t);
  struct stat file = {};
  if (::fstat(fd, &file) != 0) return absl::ErrnoToStatus(errno, "looking at the dirty bitmap");
  if (!S_ISREG(file.st_mode) || static_cast<uint64_t>(file.st_size) < needed) {
    return absl::InvalidArgumentError(absl::StrCat("the dirty bitmap from QEMU has ", file.st_size,
                                                   " bytes, ", needed, " are needed"));
  }
  // A file that could shrink would be a SIGBUS for us at a later look.
  if (const int seals = ::fcntl(fd, F_GET_SEALS); seals < 0 || (seals & F_SEAL_SHRINK) == 0) {
    return absl::InvalidArgumentError("the dirty bitmap from QEMU is not sealed against shrinking");
  }
  void* const memory = ::mmap(nullptr, needed, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  if (memory == MAP_FAILED) return absl::ErrnoToStatus(errno, "mapping the dirty bitmap");
  bitmap.file_bytes_ = needed;
  bitmap.header_ = static_cast<presync_glue_bitmap*>(memory);
  if (bitmap.header_->bytes != PagesToBytes(pages)) {
    return absl::InvalidArgumentError("the dirty bitmap from QEMU is of another range");
  }
  return bitmap;
}

SharedBitmap::SharedBitmap(SharedBitmap&& other) noexcept
    : header_(std::exchange(other.header_, nullptr)),
      file_bytes_(other.file_bytes_),
      words_(other.words_) {}

SharedBitmap::~SharedBitmap() {
  if (header_ != nullptr) ::munmap(header_, file_bytes_);
}

uint64_t* SharedBitmap::word(size_t index) const {
  return reinterpret_cast<uint64_t*>(reinterpret_cast<char*>(header_) +
                                     PRESYNC_GLUE_BITMAP_OFFSET) +
         index;
}

absl::Status SharedBitmap::AwaitBatch(absl::Time deadline) const {
  const std::atomic_ref<uint32_t> batches(header_->batches);
  const uint32_t seen = batches.load();
  if (seen % 2 == 0) return absl::OkStatus();
  while (batches.load() == seen) {
    if (MonotonicNow() >= deadline) {
      return absl::DeadlineExceededError(
          "the thread that handles write faults inside QEMU stands still");
    }
    absl::SleepFor(absl::Microseconds(5));  // a batch takes about as long
  }
  return absl::OkStatus();
}

absl::Status SharedBitmap::health() const {
  const uint32_t error = std::atomic_ref<uint32_t>(header_->broken).load();
  if (error == 0) return absl::OkStatus();
  return absl::UnavailableError(
      absl::StrCat("the thread that handles write faults inside QEMU gave up: ",
                   std::strerror(static_cast<int>(error))));
}

uint64_t SharedBitmap::TakeWord(size_t index) {
  const std::atomic_ref<uint64_t> bits(*word(index));
  // Nearly all words are 0: look before taking the cache line for writing.
  return bits.load() == 0 ? 0 : bits.exchange(0);
}

void SharedBitmap::Clear(PageRun run) {
  for (PageIndex page = run.first; page < run.end();) {
    const PageIndex next = std::min<PageIndex>((page | 63) + 1, run.end());
    const uint64_t mask = MaskOf(page % 64, page % 64 + (next - page));
    std::atomic_ref<uint64_t>(*word(page / 64)).fetch_and(~mask);
    page = next;
  }
}

absl::StatusOr<std::unique_ptr<UffdHandlerLog>> UffdHandlerLog::Create(TrackedSpace space) {
  std::vector<SharedBitmap> bitmaps;
  for (const TrackedSegment& s : space.segments()) {
    absl::StatusOr<SharedBitmap> bitmap =
        SharedBitmap::Map(s.range.bitmap.get(), s.segment.run.count);
    if (!bitmap.ok()) return bitmap.status();
    bitmaps.push_back(*std::move(bitmap));
  }
  return absl::WrapUnique(new UffdHandlerLog(std::move(space), std::move(bitmaps)));
}

UffdHandlerLog::UffdHandlerLog(TrackedSpace space, std::vector<SharedBitmap> bitmaps)
    : space_(std::move(space)), bitmaps_(std::move(bitmaps)) {}

absl::Status UffdHandlerLog::AwaitBatches() const {
  const absl::Time deadline = MonotonicNow() + kStandstill;
  for (const SharedBitmap& bitmap : bitmaps_) {
    const absl::Status status = bitmap.AwaitBatch(deadline);
    if (absl::IsDeadlineExceeded(status)) return absl::UnavailableError(status.message());
    if (!status.ok()) return status;
  }
  return absl::OkStatus();
}

absl::Status UffdHandlerLog::Peek(std::vector<PageRun>* written) {
  const size_t begin = written->size();
  absl::Status status = AwaitBatches();
  for (size_t i = 0; i < bitmaps_.size() && status.ok(); ++i) {
    TakeBits(i, begin, written);
    status = bitmaps_[i].health();
  }
  if (status.ok()) status = space_.CheckAlive();
  if (!status.ok()) written->resize(begin);
  return status;
}

void UffdHandlerLog::TakeBits(size_t index, size_t begin, std::vector<PageRun>* written) {
  const PageRun all = space_.segments()[index].segment.run;
  SharedBitmap& bitmap = bitmaps_[index];
  for (size_t w = 0; w < bitmap.words(); ++w) {
    uint64_t bits = bitmap.TakeWord(w);
    while (bits != 0) {
      const auto from = static_cast<unsigned>(std::countr_zero(bits));
      const auto length = static_cast<unsigned>(std::countr_one(bits >> from));
      bits &= ~MaskOf(from, from + length);
      const size_t first = w * 64 + from;
      if (first >= all.count) break;  // never trust the tail of the last word
      const auto count = static_cast<PageCount>(std::min<size_t>(length, all.count - first));
      space_.Take({static_cast<PageIndex>(all.first + first), count}, begin, written);
    }
  }
}

// Clear, then protect: a write after the protection sets the bit again, and one that a fault in
// flight lets through unseen is marked by the second setting (struct presync_glue_bitmap).
absl::Status UffdHandlerLog::Arm(absl::Span<const PageRun> runs) {
  absl::Status status = space_.Validate(runs);
  if (status.ok()) status = AwaitBatches();
  if (!status.ok()) return status;
  for (const PageRun& run : runs) {
    const absl::Status cleared = space_.ForEachPart(run, [this](size_t index, PageRun part) {
      const PageIndex base = space_.segments()[index].segment.run.first;
      bitmaps_[index].Clear({part.first - base, part.count});
      return absl::OkStatus();
    });
    if (!cleared.ok()) return cleared;
  }
  return space_.ProtectAndArm(runs);
}

}  // namespace presync
