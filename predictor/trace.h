// Traces: which pages a guest wrote in each scan, as recorded from a live guest and replayed
// through the policies. docs/prediction.md, "Traces", has the format.
//
// All numbers are little-endian:
//   8 bytes  "PSTRACE1"
//   u32      page size in bytes, a power of two from 512 to 2^30
//   u32      scan interval in microseconds, above 0
//   u64      pages in the region, from 1 to kMaxTracePages
//   then for each scan, until the end:
//     u32    number of runs
//     that many pairs of u32 first page, u32 page count: ascending, apart or touching, none empty
//
// Here are bytes only; files and their compression are in tools/common/trace_file.h.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "predictor/page.h"

namespace presync {

// 1 TiB of 4 KiB pages. More is taken for a broken file: whoever replays a trace allocates by this.
inline constexpr uint64_t kMaxTracePages = uint64_t{1} << 28;
// The most bytes of an uncompressed trace: 5 minutes of a guest that writes 40,000 scattered pages
// in each scan of 100 ms. A few KB can decompress to any size, so there has to be a limit.
inline constexpr uint64_t kMaxTraceBytes = uint64_t{1} << 30;

// 116 hours of scans at 100 ms: an empty scan takes 4 bytes of a file, and next to none compressed.
inline constexpr uint64_t kMaxTraceScans = uint64_t{1} << 22;

struct TraceHeader {
  uint32_t page_bytes = kPageBytes;
  uint32_t scan_interval_us = 100'000;
  PageCount pages = 0;

  friend bool operator==(const TraceHeader&, const TraceHeader&) = default;
};

// A whole trace in memory, 8 bytes a run. A value.
class Trace {
 public:
  // Precondition (CHECKed): header.pages is above 0.
  explicit Trace(const TraceHeader& header);

  const TraceHeader& header() const { return header_; }
  size_t scans() const { return ends_.size(); }
  // What was written in scan `i`, counted from 0: ascending runs, which may touch.
  absl::Span<const PageRun> Scan(size_t i) const;
  // Sum of the pages over all scans.
  uint64_t pages_written() const { return pages_written_; }

  // Precondition (CHECKed): ascending runs, none empty, within header().pages.
  void AddScan(absl::Span<const PageRun> written);

  friend bool operator==(const Trace&, const Trace&) = default;

 private:
  TraceHeader header_;
  std::vector<PageRun> runs_;
  std::vector<uint64_t> ends_;  // of each scan in runs_
  uint64_t pages_written_ = 0;
};

// Appends the encoded header, and one encoded scan. Preconditions as in Trace.
void AppendTraceHeader(const TraceHeader& header, std::string* out);
void AppendTraceScan(absl::Span<const PageRun> written, std::string* out);

// Decodes a trace that comes in pieces of any size. Trusts nothing: memory grows with the bytes
// that really came. Not thread-safe.
class TraceParser {
 public:
  explicit TraceParser(uint64_t max_bytes = kMaxTraceBytes) : max_bytes_(max_bytes) {}

  // INVALID_ARGUMENT: malformed; RESOURCE_EXHAUSTED: more than max_bytes, or than kMaxTraceScans.
  // Both name the offset in the uncompressed stream. After an error the parser must not be used
  // again.
  absl::Status Feed(absl::Span<const uint8_t> bytes);

  // Bytes taken so far.
  uint64_t offset() const { return offset_; }

  // The end of the stream. INVALID_ARGUMENT: it ends inside the header or inside a scan.
  absl::StatusOr<Trace> Finish() &&;

 private:
  enum class Next { kHeader, kRunCount, kRun };

  size_t FieldBytes() const;
  absl::Status TakeField(const uint8_t* field);
  absl::Status TakeHeader(const uint8_t* field);
  absl::Status TakeRun(const uint8_t* field);
  void EndScanIfComplete();

  uint64_t max_bytes_;
  uint64_t offset_ = 0;  // of the next field
  Next next_ = Next::kHeader;
  std::array<uint8_t, 24> partial_;  // a field of which a part has come
  size_t partial_bytes_ = 0;
  TraceHeader header_;
  std::optional<Trace> trace_;  // from the header on
  uint32_t runs_left_ = 0;
  std::vector<PageRun> scan_;
};

// All of it at once. Errors as in TraceParser.
absl::StatusOr<Trace> ParseTrace(absl::Span<const uint8_t> bytes);

}  // namespace presync
