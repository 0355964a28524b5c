#include "qemu-glue/dirty_log/uffd_async_log.h"

#include <cerrno>
#include <cstring>
#include <utility>

#include "absl/memory/memory.h"
#include "absl/strings/str_cat.h"

namespace presync {
namespace {

// Runs a call of PAGEMAP_SCAN returns at most; 96 KiB. The kernel gathers 512 at a time itself.
constexpr size_t kFoundRuns = 4096;

// PAGEMAP_SCAN over [start, end): how many regions of `category` it put into `found`. CHECK_WPASYNC
// makes the kernel fail on memory that is not registered instead of skipping it in silence.
absl::StatusOr<size_t> Scan(int pagemap, uint64_t start, uint64_t end, uint64_t category,
                            absl::Span<page_region> found) {
  pm_scan_arg arg = {};
  arg.size = sizeof(arg);
  arg.flags = PM_SCAN_CHECK_WPASYNC;
  arg.start = start;
  arg.end = end;
  arg.vec = reinterpret_cast<uint64_t>(found.data());
  arg.vec_len = found.size();
  arg.category_mask = category;
  arg.return_mask = category;
  while (true) {
    const int count = ::ioctl(pagemap, PAGEMAP_SCAN, &arg);
    if (count >= 0) return static_cast<size_t>(count);
    if (errno == EINTR) continue;
    if (errno == EPERM) {
      return absl::UnavailableError(
          "scanning QEMU's memory: EPERM: guest RAM is tracked no longer, something in QEMU "
          "unregistered or remapped it");
    }
    if (errno == ESRCH) return absl::UnavailableError("scanning QEMU's memory: QEMU has ended");
    if (errno == ENOTTY || errno == EINVAL) {
      return absl::UnimplementedError(
          absl::StrCat("PAGEMAP_SCAN: ", std::strerror(errno),
                       ": the kernel lacks it: uffd-async needs Linux 6.7"));
    }
    return absl::UnavailableError(absl::StrCat("scanning QEMU's memory: ", std::strerror(errno)));
  }
}

}  // namespace

std::unique_ptr<UffdAsyncLog> UffdAsyncLog::Create(TrackedSpace space) {
  return absl::WrapUnique(new UffdAsyncLog(std::move(space)));
}

UffdAsyncLog::UffdAsyncLog(TrackedSpace space) : space_(std::move(space)), found_(kFoundRuns) {}

absl::Status UffdAsyncLog::Peek(std::vector<PageRun>* written) {
  const size_t begin = written->size();
  absl::Status status;
  for (const TrackedSegment& s : space_.segments()) {
    status = ScanSegment(s.segment, begin, written);
    if (status.ok()) status = CheckMapped(s.segment);
    if (!status.ok()) break;
  }
  // After the scans: memory of a process that is ending reads as never written.
  if (status.ok()) status = space_.CheckAlive();
  if (!status.ok()) written->resize(begin);
  return status;
}

absl::Status UffdAsyncLog::ScanSegment(const Segment& segment, size_t begin,
                                       std::vector<PageRun>* written) {
  const auto first_armed = space_.armed().NextRun(segment.run.first, 1);
  if (!first_armed.has_value() || first_armed->first >= segment.run.end()) return absl::OkStatus();
  uint64_t from = segment.AddressOf(first_armed->first);
  const uint64_t end = segment.address + segment.bytes();
  while (from < end) {
    const absl::StatusOr<size_t> count =
        Scan(space_.process().pagemap(), from, end, PAGE_IS_WRITTEN, absl::MakeSpan(found_));
    if (!count.ok()) return count.status();
    for (size_t i = 0; i < *count; ++i) {
      const auto first = static_cast<PageIndex>(segment.run.first +
                                                (found_[i].start - segment.address) / kPageBytes);
      const auto pages = static_cast<PageCount>((found_[i].end - found_[i].start) / kPageBytes);
      space_.Take({first, pages}, begin, written);
    }
    if (*count < found_.size()) break;
    from = found_.back().end;  // not walk_end: it is stale when more than 512 regions came back
  }
  return absl::OkStatus();
}

// Where nothing is mapped a scan finds nothing and says so happily. QEMU unmaps RAM blocks as a
// whole.
absl::Status UffdAsyncLog::CheckMapped(const Segment& segment) {
  page_region region = {};
  const absl::StatusOr<size_t> count =
      Scan(space_.process().pagemap(), segment.address, segment.address + kPageBytes,
           PAGE_IS_WPALLOWED, absl::MakeSpan(&region, 1));
  if (!count.ok()) return count.status();
  if (*count == 1) return absl::OkStatus();
  return absl::UnavailableError(
      "guest RAM is not mapped in QEMU any more: it has ended or removed it");
}

absl::Status UffdAsyncLog::Arm(absl::Span<const PageRun> runs) {
  const absl::Status valid = space_.Validate(runs);
  return valid.ok() ? space_.ProtectAndArm(runs) : valid;
}

}  // namespace presync
