#include "transport/tcp/sender.h"

#include <time.h>

#include <algorithm>
#include <cstring>

#include "transport/clock.h"

namespace presync {
namespace {

FrameType TypeOf(Codec codec) { return codec == Codec::kLz4 ? FrameType::kLz4 : FrameType::kZstd; }

absl::Duration Since(absl::Time start) { return MonotonicNow() - start; }

// Of this thread.
absl::Duration CpuTime() {
  timespec time;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &time);
  return absl::DurationFromTimespec(time);
}

}  // namespace

FrameSender::FrameSender(const GuestMemory* memory, ByteStream* stream, Compression compression)
    : memory_(memory), stream_(stream), compression_(compression) {
  headers_.reserve(kMaxBatchFrames * kFrameHeaderBytes);  // parts_ points into it
  parts_.reserve(2 * kMaxBatchFrames);
  if (compression == Compression::kNone) return;
  stable_.resize(PagesToBytes(kMaxBatchPages));
  compressed_.resize(PagesToBytes(kMaxBatchPages));  // no payload is larger than its pages
}

Codec FrameSender::ChosenCodec() const {
  switch (compression_) {
    case Compression::kNone:
      return Codec::kNone;
    case Compression::kLz4:
      return Codec::kLz4;
    case Compression::kZstd:
      return Codec::kZstd;
    case Compression::kAuto:
      return chooser_.codec();
  }
  return Codec::kNone;
}

absl::StatusOr<uint64_t> FrameSender::Send(absl::Span<const Frame> frames, bool backlogged) {
  headers_.clear();
  parts_.clear();
  compressed_used_ = 0;
  batch_wire_bytes_ = 0;
  const bool measured = compression_ == Compression::kAuto;
  CodecChooser::Sent sent;
  const absl::Time start = MonotonicNow();
  for (const Frame& frame : frames) {
    if (frame.type == FrameType::kBytes) sent.guest_bytes += PagesToBytes(frame.run.count);
    Add(frame);
  }
  const absl::Time built = MonotonicNow();
  const absl::Duration cpu = measured ? CpuTime() : absl::ZeroDuration();
  if (auto status = stream_->Send(absl::MakeSpan(parts_)); !status.ok()) return status;
  if (measured) {
    sent.wire_bytes = batch_wire_bytes_;
    sent.compressing = built - start;
    sent.sending = Since(built);
    sent.sending_cpu = CpuTime() - cpu;
    sent.backlogged = backlogged;
    chooser_.OnSent(sent);
  }
  return batch_wire_bytes_;
}

void FrameSender::AddPart(std::byte* data, size_t size) {
  parts_.push_back({data, size});
  batch_wire_bytes_ += size;
}

void FrameSender::Add(Frame frame) {
  if (frame.type == FrameType::kBytes) return AddPages(frame, memory_->Bytes(frame.run));
  headers_.resize(headers_.size() + kFrameHeaderBytes);
  std::byte* header = &headers_[headers_.size() - kFrameHeaderBytes];
  EncodeFrame(frame, header);
  AddPart(header, kFrameHeaderBytes);
}

void FrameSender::AddPages(Frame frame, absl::Span<std::byte> bytes) {
  std::byte* payload = bytes.data();
  size_t payload_bytes = bytes.size();
  const bool sample = compression_ == Compression::kAuto && chooser_.WantsSample();
  if (ChosenCodec() != Codec::kNone || sample) {
    memcpy(stable_.data(), bytes.data(), bytes.size());
    const auto stable = absl::MakeConstSpan(stable_).first(bytes.size());
    if (sample) Sample(stable);
    const Codec codec = ChosenCodec();
    const size_t size = codec == Codec::kNone ? 0 : TryCompress(codec, stable);
    if (size > 0) {
      frame.type = TypeOf(codec);
      payload = &compressed_[compressed_used_];
      payload_bytes = size;
      compressed_used_ += size;
    }
  }
  frame.payload_bytes = static_cast<uint32_t>(payload_bytes);
  headers_.resize(headers_.size() + kFrameHeaderBytes);
  std::byte* header = &headers_[headers_.size() - kFrameHeaderBytes];
  EncodeFrame(frame, header);
  AddPart(header, kFrameHeaderBytes);
  AddPart(payload, payload_bytes);
}

// Compresses to the free end of compressed_; 0: not worth it. The pages of a batch fit
// uncompressed, so there is always room for what is smaller.
size_t FrameSender::TryCompress(Codec codec, absl::Span<const std::byte> bytes) {
  const size_t worth = bytes.size() - bytes.size() / 16;  // the target must decompress it, too
  const absl::Time start = MonotonicNow();
  const size_t size = compressor_.Compress(
      codec, bytes, absl::MakeSpan(compressed_).subspan(compressed_used_, worth));
  if (compression_ == Compression::kAuto) {
    chooser_.OnCompressed(codec, bytes.size(), size == 0 ? bytes.size() : size, Since(start));
  }
  return size;
}

void FrameSender::Sample(absl::Span<const std::byte> bytes) {
  constexpr size_t kSampleBytes = 64 << 10;
  const auto sample = bytes.first(std::min(bytes.size(), kSampleBytes));
  TryCompress(Codec::kLz4, sample);
  TryCompress(Codec::kZstd, sample);
  chooser_.OnSampled();
}

}  // namespace presync
