// The frames of the TCP link. docs/tcp-link.md is the same as prose, for who writes another end.
//
// A frame is a header of 24 bytes, little-endian, then `payload bytes` bytes:
//
//   offset  size  field          bytes   zero   lz4, zstd      commit, ack
//   0       1     type           1       2      3, 4           5, 6
//   1       1     flags          0       0      0              0
//   2       2     reserved       0       0      0              0
//   4       4     first page     flat page index               0
//   8       4     pages          1 to 512                      0
//   12      4     payload bytes  4096 x pages   0   1 to 4096 x pages - 1   0
//   16      8     commit id      0       0      0              the id, from 1 on
//
// Pages belong to streams: page p goes by stream (p / 512) % number of streams, and a frame stays
// within one group of 512 pages and within one region. So all writes of a page go by one stream, in
// order.
#pragma once

#include <cstddef>
#include <cstdint>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "predictor/page.h"
#include "transport/link.h"
#include "transport/memory.h"

namespace presync {

inline constexpr size_t kFrameHeaderBytes = 24;
inline constexpr PageCount kShardPages = 512;  // 2 MiB: a huge page goes by one stream
inline constexpr size_t kMaxFrameStreams = 64;

enum class FrameType : uint8_t {
  kBytes = 1,
  kZero = 2,
  kLz4 = 3,
  kZstd = 4,
  kCommit = 5,
  kAck = 6
};

struct Frame {
  FrameType type = FrameType::kBytes;
  PageRun run;
  uint32_t payload_bytes = 0;
  CommitId commit = 0;

  friend bool operator==(const Frame&, const Frame&) = default;
};

// Which of `streams` carries `page`.
constexpr size_t StreamOf(PageIndex page, size_t streams) { return (page / kShardPages) % streams; }

// `run` without its first part that goes in one frame of at most `max_pages`, which is returned.
PageRun TakeFrameRun(PageRun* run, PageCount max_pages);

// Precondition: `header` has kFrameHeaderBytes.
void EncodeFrame(const Frame& frame, std::byte* header);

// INVALID_ARGUMENT: not a header as above, whatever the memory it is for.
absl::StatusOr<Frame> DecodeFrame(absl::Span<const std::byte> header);

// Whether a page frame may be applied to `memory`, received by stream `stream` of `streams`.
// INVALID_ARGUMENT: outside the memory, over a border, or not this stream's.
absl::Status CheckPlace(const Frame& frame, const GuestMemory& memory, size_t stream,
                        size_t streams);

}  // namespace presync
