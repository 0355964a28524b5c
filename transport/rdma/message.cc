#include "transport/rdma/message.h"

#include <algorithm>
#include <bit>
#include <cstring>

#include "absl/strings/str_cat.h"

namespace presync {
namespace {

static_assert(std::endian::native == std::endian::little, "fields are copied as they are");

template <typename T>
void Put(std::byte* out, size_t offset, T value) {
  std::memcpy(out + offset, &value, sizeof(value));
}
template <typename T, typename Byte>
T Get(absl::Span<const Byte> bytes, size_t offset) {
  T value;
  std::memcpy(&value, bytes.data() + offset, sizeof(value));
  return value;
}

constexpr char kConnectMagic[] = {'P', 'S', 'R', '1'};

}  // namespace

size_t EncodeMessage(const RdmaMessage& message, std::byte* out) {
  Put(out, 0, static_cast<uint32_t>(message.type));
  Put(out, 4, message.runs);
  Put(out, 8, message.number);
  Put(out, 16, message.commit);
  for (uint32_t i = 0; i < message.runs; ++i) {
    Put(out, kMessageHeaderBytes + 8 * i, message.run[i].first);
    Put(out, kMessageHeaderBytes + 8 * i + 4, message.run[i].count);
  }
  return kMessageHeaderBytes + size_t{8} * message.runs;
}

absl::StatusOr<RdmaMessage> DecodeMessage(absl::Span<const std::byte> bytes) {
  if (bytes.size() < kMessageHeaderBytes || bytes.size() > kMaxMessageBytes) {
    return absl::InvalidArgumentError(
        absl::StrCat("rdma link: a message of ", bytes.size(), " bytes"));
  }
  RdmaMessage message;
  const uint32_t type = Get<uint32_t>(bytes, 0);
  message.type = static_cast<MessageType>(type);
  message.runs = Get<uint32_t>(bytes, 4);
  message.number = Get<uint64_t>(bytes, 8);
  message.commit = Get<uint64_t>(bytes, 16);
  const bool zero = message.type == MessageType::kZero;
  const bool commit = message.type == MessageType::kCommit;
  if (type < 1 || type > 3 || message.number == 0 || (message.runs > 0) != zero ||
      (message.commit > 0) != commit || message.runs > kMaxMessageRuns ||
      bytes.size() != kMessageHeaderBytes + size_t{8} * message.runs) {
    return absl::InvalidArgumentError("rdma link: a malformed message");
  }
  for (uint32_t i = 0; i < message.runs; ++i) {
    message.run[i] = {Get<uint32_t>(bytes, kMessageHeaderBytes + 8 * i),
                      Get<uint32_t>(bytes, kMessageHeaderBytes + 8 * i + 4)};
  }
  return message;
}

std::array<uint8_t, kConnectDataBytes> EncodeConnectData(const ConnectData& data) {
  std::array<uint8_t, kConnectDataBytes> bytes;
  std::memcpy(bytes.data(), kConnectMagic, 4);
  std::memcpy(bytes.data() + 4, &data.index, 4);
  std::memcpy(bytes.data() + 8, &data.total, 4);
  std::memcpy(bytes.data() + 12, data.token.data(), data.token.size());
  return bytes;
}

absl::StatusOr<ConnectData> DecodeConnectData(absl::Span<const uint8_t> bytes) {
  if (bytes.size() < kConnectDataBytes || std::memcmp(bytes.data(), kConnectMagic, 4) != 0) {
    return absl::InvalidArgumentError("rdma link: a connection of somebody else's");
  }
  ConnectData data;
  data.index = Get<uint32_t>(bytes, 4);
  data.total = Get<uint32_t>(bytes, 8);
  std::memcpy(data.token.data(), bytes.data() + 12, data.token.size());
  return data;
}

}  // namespace presync
