#include "transport/tcp/frame.h"

#include <algorithm>

#include "absl/strings/str_cat.h"

namespace presync {
namespace {

template <typename T>
void PutLittleEndian(T value, std::byte* out) {
  for (size_t i = 0; i < sizeof(T); ++i) out[i] = static_cast<std::byte>(value >> (8 * i));
}

template <typename T>
T GetLittleEndian(const std::byte* in) {
  T value = 0;
  for (size_t i = 0; i < sizeof(T); ++i) value |= static_cast<T>(in[i]) << (8 * i);
  return value;
}

bool IsShapeRight(const Frame& frame) {
  const bool has_pages = frame.run.count >= 1 && frame.run.count <= kShardPages;
  const uint64_t guest_bytes = PagesToBytes(frame.run.count);
  switch (frame.type) {
    case FrameType::kBytes:
      return has_pages && frame.payload_bytes == guest_bytes && frame.commit == 0;
    case FrameType::kZero:
      return has_pages && frame.payload_bytes == 0 && frame.commit == 0;
    case FrameType::kLz4:
    case FrameType::kZstd:
      return has_pages && frame.payload_bytes >= 1 && frame.payload_bytes < guest_bytes &&
             frame.commit == 0;
    case FrameType::kCommit:
    case FrameType::kAck:
      return frame.run == PageRun{} && frame.payload_bytes == 0 && frame.commit != 0;
  }
  return false;
}

std::string Describe(const Frame& frame) {
  return absl::StrCat("frame of type ", static_cast<int>(frame.type), ", ", frame.run.count,
                      " pages from ", frame.run.first, ", payload ", frame.payload_bytes,
                      ", commit ", frame.commit);
}

}  // namespace

PageRun TakeFrameRun(PageRun* run, PageCount max_pages) {
  const PageCount to_border = kShardPages - run->first % kShardPages;
  const PageRun taken{run->first, std::min({run->count, to_border, max_pages})};
  *run = {taken.end(), run->count - taken.count};
  return taken;
}

void EncodeFrame(const Frame& frame, std::byte* header) {
  PutLittleEndian<uint32_t>(static_cast<uint8_t>(frame.type), header);  // flags, reserved: 0
  PutLittleEndian<uint32_t>(frame.run.first, header + 4);
  PutLittleEndian<uint32_t>(frame.run.count, header + 8);
  PutLittleEndian<uint32_t>(frame.payload_bytes, header + 12);
  PutLittleEndian<uint64_t>(frame.commit, header + 16);
}

absl::StatusOr<Frame> DecodeFrame(absl::Span<const std::byte> header) {
  if (header.size() != kFrameHeaderBytes) {
    return absl::InvalidArgumentError(absl::StrCat("frame header of ", header.size(), " bytes"));
  }
  const uint32_t type = GetLittleEndian<uint32_t>(header.data());
  if (type > 255) return absl::InvalidArgumentError("frame with flags or reserved bits set");
  Frame frame;
  frame.type = static_cast<FrameType>(type);
  frame.run.first = GetLittleEndian<uint32_t>(header.data() + 4);
  frame.run.count = GetLittleEndian<uint32_t>(header.data() + 8);
  frame.payload_bytes = GetLittleEndian<uint32_t>(header.data() + 12);
  frame.commit = GetLittleEndian<uint64_t>(header.data() + 16);
  if (!IsShapeRight(frame)) {
    return absl::InvalidArgumentError(absl::StrCat("malformed ", Describe(frame)));
  }
  return frame;
}

absl::Status CheckPlace(const Frame& frame, const GuestMemory& memory, size_t stream,
                        size_t streams) {
  if (!memory.IsWithinOneRegion(frame.run)) {
    return absl::InvalidArgumentError(
        absl::StrCat(Describe(frame), " is not within one region of the guest"));
  }
  const bool one_shard = frame.run.first % kShardPages + frame.run.count <= kShardPages;
  if (!one_shard || StreamOf(frame.run.first, streams) != stream) {
    return absl::InvalidArgumentError(absl::StrCat(Describe(frame), " does not belong to stream ",
                                                   stream, " of ", streams,
                                                   "; are the streams in the same order?"));
  }
  return absl::OkStatus();
}

}  // namespace presync
