// The messages of the RDMA link, beside its plain writes. docs/rdma-link.md is the same as prose.
//
// A message is sent on one queue pair, at most kMaxMessageBytes, little-endian:
//
//   offset  size  field
//   0       4     type: 1 zero, 2 commit, 3 answer
//   4       4     runs: 1 to kMaxMessageRuns in zero, else 0
//   8       8     number: of the source's messages on this queue pair, 1, 2, 3, ...; in an answer
//                 the newest that was handled, with all before it
//   16      8     commit id in commit, else 0
//   24      8     for each run: first page, pages (4 bytes each)
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "predictor/page.h"
#include "transport/link.h"

namespace presync {

inline constexpr size_t kMaxMessageRuns = 24;
inline constexpr size_t kMessageHeaderBytes = 24;
// 216: within the 220 bytes that mlx5 sends inline with one work request of its usual size.
inline constexpr size_t kMaxMessageBytes = kMessageHeaderBytes + 8 * kMaxMessageRuns;
// Messages of one queue pair that may wait for their answer: the target has a receive for each.
inline constexpr uint32_t kMessageWindow = 16;

enum class MessageType : uint32_t { kZero = 1, kCommit = 2, kAnswer = 3 };

struct RdmaMessage {
  MessageType type = MessageType::kZero;
  uint32_t runs = 0;
  uint64_t number = 0;
  CommitId commit = 0;
  std::array<PageRun, kMaxMessageRuns> run = {};
};

// Writes the message to `out`, which has kMaxMessageBytes, and returns its length.
size_t EncodeMessage(const RdmaMessage& message, std::byte* out);

// INVALID_ARGUMENT: not a message as above, whatever the memory it is for.
absl::StatusOr<RdmaMessage> DecodeMessage(absl::Span<const std::byte> bytes);

// What the source tells with a connection of the connection manager, so that the target knows whose
// it is. 28 bytes: the text "PSR1", index, total (4 bytes each), token.
inline constexpr size_t kConnectDataBytes = 28;
struct ConnectData {
  uint32_t index = 0;  // of this queue pair
  uint32_t total = 0;  // queue pairs of the link
  std::array<uint8_t, 16> token = {};
};
std::array<uint8_t, kConnectDataBytes> EncodeConnectData(const ConnectData& data);
// INVALID_ARGUMENT: not ours. More bytes may follow (the connection manager pads).
absl::StatusOr<ConnectData> DecodeConnectData(absl::Span<const uint8_t> bytes);

}  // namespace presync
