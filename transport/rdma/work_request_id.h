// What a completion tells of the work request that it ends: kind, queue pair, and for writes how
// many pieces (modulo 2^32) the queue pair has finished with it.
#pragma once

#include <cstdint>

namespace presync {

enum class RequestKind : uint8_t { kWrite = 1, kMessage = 2, kReceive = 3 };

constexpr uint64_t RequestId(RequestKind kind, uint32_t queue, uint32_t number) {
  return uint64_t{static_cast<uint8_t>(kind)} << 56 | uint64_t{queue & 0xffffff} << 32 | number;
}
constexpr uint64_t WriteId(uint32_t queue, uint32_t pieces) {
  return RequestId(RequestKind::kWrite, queue, pieces);
}
constexpr uint64_t MessageId(uint32_t queue) { return RequestId(RequestKind::kMessage, queue, 0); }
// `buffer`: which message buffer the receive fills.
constexpr uint64_t ReceiveId(uint32_t queue, uint32_t buffer) {
  return RequestId(RequestKind::kReceive, queue, buffer);
}

constexpr RequestKind KindOf(uint64_t id) { return static_cast<RequestKind>(id >> 56); }
constexpr uint32_t QueueOf(uint64_t id) { return static_cast<uint32_t>(id >> 32) & 0xffffff; }
constexpr uint32_t PieceOf(uint64_t id) { return static_cast<uint32_t>(id); }
constexpr uint32_t BufferOf(uint64_t id) { return static_cast<uint32_t>(id); }

}  // namespace presync
