#include "predictor/trace.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <utility>

#include "absl/strings/str_cat.h"
#include "predictor/check.h"

namespace presync {
namespace {

constexpr char kMagic[] = "PSTRACE1";
constexpr size_t kMagicBytes = sizeof(kMagic) - 1;
constexpr size_t kHeaderBytes = kMagicBytes + 4 + 4 + 8;

template <typename T>
T Load(const uint8_t* from) {
  T value = 0;
  for (size_t i = 0; i < sizeof(T); ++i) value |= static_cast<T>(from[i]) << (8 * i);
  return value;
}

template <typename T>
void Append(T value, std::string* out) {
  for (size_t i = 0; i < sizeof(T); ++i) out->push_back(static_cast<char>(value >> (8 * i)));
}

template <typename... Parts>
absl::Status Malformed(uint64_t offset, const Parts&... parts) {
  return absl::InvalidArgumentError(
      absl::StrCat("malformed trace at offset ", offset, ": ", parts...));
}

}  // namespace

Trace::Trace(const TraceHeader& header) : header_(header) { PRESYNC_CHECK(header.pages > 0); }

absl::Span<const PageRun> Trace::Scan(size_t i) const {
  const uint64_t begin = i == 0 ? 0 : ends_[i - 1];
  return absl::MakeConstSpan(runs_).subspan(begin, ends_[i] - begin);
}

void Trace::AddScan(absl::Span<const PageRun> written) {
  uint64_t end = 0;
  for (const PageRun& run : written) {
    PRESYNC_CHECK(run.count > 0 && run.first >= end);
    end = uint64_t{run.first} + run.count;
    PRESYNC_CHECK(end <= header_.pages);
    pages_written_ += run.count;
  }
  runs_.insert(runs_.end(), written.begin(), written.end());
  ends_.push_back(runs_.size());
}

void AppendTraceHeader(const TraceHeader& header, std::string* out) {
  out->append(kMagic, kMagicBytes);
  Append(header.page_bytes, out);
  Append(header.scan_interval_us, out);
  Append(uint64_t{header.pages}, out);
}

void AppendTraceScan(absl::Span<const PageRun> written, std::string* out) {
  Append(static_cast<uint32_t>(written.size()), out);
  for (const PageRun& run : written) {
    Append(run.first, out);
    Append(run.count, out);
  }
}

size_t TraceParser::FieldBytes() const {
  switch (next_) {
    case Next::kHeader:
      return kHeaderBytes;
    case Next::kRunCount:
      return 4;
    case Next::kRun:
      return 8;
  }
  __builtin_unreachable();
}

absl::Status TraceParser::Feed(absl::Span<const uint8_t> bytes) {
  static_assert(kHeaderBytes <= sizeof(partial_));
  while (!bytes.empty()) {
    const size_t wanted = FieldBytes();
    const uint8_t* field = bytes.data();
    size_t taken = wanted;
    if (partial_bytes_ > 0 || bytes.size() < wanted) {
      taken = std::min(wanted - partial_bytes_, bytes.size());
      std::memcpy(partial_.data() + partial_bytes_, bytes.data(), taken);
      partial_bytes_ += taken;
      field = partial_.data();
    }
    bytes.remove_prefix(taken);
    if (partial_bytes_ > 0 && partial_bytes_ < wanted) return absl::OkStatus();
    partial_bytes_ = 0;
    if (offset_ + wanted > max_bytes_) {
      return absl::ResourceExhaustedError(absl::StrCat(
          "trace at offset ", offset_, ": larger than the ", max_bytes_, " bytes that are read"));
    }
    if (absl::Status s = TakeField(field); !s.ok()) return s;
    offset_ += wanted;
  }
  return absl::OkStatus();
}

absl::Status TraceParser::TakeField(const uint8_t* field) {
  switch (next_) {
    case Next::kHeader:
      return TakeHeader(field);
    case Next::kRunCount:
      if (trace_->scans() == kMaxTraceScans) {
        return absl::ResourceExhaustedError(
            absl::StrCat("trace at offset ", offset_, ": more than ", kMaxTraceScans, " scans"));
      }
      runs_left_ = Load<uint32_t>(field);
      if (runs_left_ > header_.pages) {
        return Malformed(offset_, runs_left_, " runs in a scan of ", header_.pages, " pages");
      }
      EndScanIfComplete();
      return absl::OkStatus();
    case Next::kRun:
      return TakeRun(field);
  }
  __builtin_unreachable();
}

absl::Status TraceParser::TakeHeader(const uint8_t* field) {
  if (std::memcmp(field, kMagic, kMagicBytes) != 0) {
    return Malformed(0, "it does not begin with ", kMagic);
  }
  header_.page_bytes = Load<uint32_t>(field + kMagicBytes);
  if (header_.page_bytes < 512 || header_.page_bytes > 1u << 30 ||
      !std::has_single_bit(header_.page_bytes)) {
    return Malformed(kMagicBytes, "a page size of ", header_.page_bytes,
                     " bytes; expected a power of two from 512 to 2^30");
  }
  header_.scan_interval_us = Load<uint32_t>(field + kMagicBytes + 4);
  if (header_.scan_interval_us == 0) return Malformed(kMagicBytes + 4, "a scan interval of 0");
  const uint64_t pages = Load<uint64_t>(field + kMagicBytes + 8);
  if (pages == 0 || pages > kMaxTracePages) {
    return Malformed(kMagicBytes + 8, "a region of ", pages, " pages; expected 1 to ",
                     kMaxTracePages);
  }
  header_.pages = static_cast<PageCount>(pages);
  trace_.emplace(header_);
  next_ = Next::kRunCount;
  return absl::OkStatus();
}

absl::Status TraceParser::TakeRun(const uint8_t* field) {
  const PageRun run = {Load<uint32_t>(field), Load<uint32_t>(field + 4)};
  if (run.count == 0) return Malformed(offset_ + 4, "an empty run");
  if (!scan_.empty() && run.first < scan_.back().end()) {
    return Malformed(offset_, "a run from page ", run.first, " on behind one that ends at page ",
                     scan_.back().end());
  }
  if (run.first >= header_.pages || run.count > header_.pages - run.first) {
    return Malformed(offset_, "a run of ", run.count, " pages from page ", run.first, " on in ",
                     header_.pages, " pages");
  }
  scan_.push_back(run);
  --runs_left_;
  EndScanIfComplete();
  return absl::OkStatus();
}

void TraceParser::EndScanIfComplete() {
  next_ = runs_left_ > 0 ? Next::kRun : Next::kRunCount;
  if (runs_left_ > 0) return;
  trace_->AddScan(scan_);
  scan_.clear();
}

absl::StatusOr<Trace> TraceParser::Finish() && {
  const uint64_t end = offset_ + partial_bytes_;
  if (next_ == Next::kHeader) {
    const size_t compared = std::min(partial_bytes_, kMagicBytes);
    if (std::memcmp(partial_.data(), kMagic, compared) != 0) {
      return Malformed(0, "it does not begin with ", kMagic);
    }
    return Malformed(end, "it ends inside the header");
  }
  if (next_ == Next::kRun) return Malformed(end, "it ends ", runs_left_, " runs before its scan");
  if (partial_bytes_ > 0) return Malformed(end, "it ends inside a scan's number of runs");
  return *std::move(trace_);
}

absl::StatusOr<Trace> ParseTrace(absl::Span<const uint8_t> bytes) {
  TraceParser parser;
  if (absl::Status s = parser.Feed(bytes); !s.ok()) return s;
  return std::move(parser).Finish();
}

}  // namespace presync
