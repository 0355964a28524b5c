// Trace files: plain and compressed, and the parser fed in pieces. What is taken comes out again.
#include <sys/mman.h>
#include <unistd.h>

#include "predictor/trace.h"
#include "tests/fuzz/fuzz_input.h"
#include "tools/common/trace_file.h"
#include "transport/unique_fd.h"

namespace presync {
namespace {

constexpr uint64_t kMaxBytes = 8 << 20;

absl::StatusOr<Trace> InPieces(absl::Span<const uint8_t> bytes, size_t piece) {
  TraceParser parser(kMaxBytes);
  while (!bytes.empty()) {
    const absl::Span<const uint8_t> head = bytes.subspan(0, piece);
    if (absl::Status s = parser.Feed(head); !s.ok()) return s;
    bytes.remove_prefix(head.size());
  }
  return std::move(parser).Finish();
}

std::string Encode(const Trace& trace) {
  std::string bytes;
  AppendTraceHeader(trace.header(), &bytes);
  for (size_t i = 0; i < trace.scans(); ++i) AppendTraceScan(trace.Scan(i), &bytes);
  return bytes;
}

absl::StatusOr<Trace> FromFile(absl::Span<const uint8_t> bytes) {
  const UniqueFd file(::memfd_create("presync-fuzz-trace", MFD_CLOEXEC));
  FUZZ_REQUIRE(::write(file.get(), bytes.data(), bytes.size()) ==
               static_cast<ssize_t>(bytes.size()));
  return ReadTraceFile("/proc/self/fd/" + std::to_string(file.get()));
}

}  // namespace
}  // namespace presync

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const absl::Span<const uint8_t> bytes(data, size);
  const size_t piece = size == 0 ? 1 : 1 + data[size - 1] % 40;
  const absl::StatusOr<presync::Trace> whole = presync::InPieces(bytes, std::max<size_t>(size, 1));
  const absl::StatusOr<presync::Trace> pieces = presync::InPieces(bytes, piece);
  const absl::StatusOr<presync::Trace> file = presync::FromFile(bytes);
  FUZZ_REQUIRE(whole.status().code() == pieces.status().code());
  if (whole.ok()) {
    FUZZ_REQUIRE(*whole == *pieces && file.ok() && *file == *whole);
    FUZZ_REQUIRE(presync::Encode(*whole) == std::string(reinterpret_cast<const char*>(data), size));
  }
  return 0;
}
