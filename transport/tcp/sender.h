// Turns pieces of writes into frames and sends them: one for each stream of a TCP link's source
// end.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "transport/memory.h"
#include "transport/tcp/byte_stream.h"
#include "transport/tcp/codec.h"
#include "transport/tcp/codec_choice.h"
#include "transport/tcp/frame.h"
#include "transport/tcp/tcp_options.h"

namespace presync {

// Used by one thread.
class FrameSender {
 public:
  // A batch goes out in one system call. 64 lone pages, or one long piece: beyond 256 KiB a call is
  // not noticeably cheaper per byte, and completions would come later.
  static constexpr size_t kMaxBatchFrames = 64;
  static constexpr PageCount kMaxBatchPages = 64;

  FrameSender(const GuestMemory* memory, ByteStream* stream, Compression compression);

  // Sends `frames` (kBytes, kZero, kCommit; together within the limits above), compressed where it
  // pays. `backlogged`: more was waiting. Returns the bytes given to the network. UNAVAILABLE:
  // gone.
  absl::StatusOr<uint64_t> Send(absl::Span<const Frame> frames, bool backlogged);

 private:
  Codec ChosenCodec() const;
  void Add(Frame frame);
  void AddPages(Frame frame, absl::Span<std::byte> bytes);
  size_t TryCompress(Codec codec, absl::Span<const std::byte> bytes);
  void Sample(absl::Span<const std::byte> bytes);
  void AddPart(std::byte* data, size_t size);

  const GuestMemory* const memory_;
  ByteStream* const stream_;
  const Compression compression_;
  Compressor compressor_;
  CodecChooser chooser_;
  std::vector<std::byte> headers_;
  std::vector<std::byte> stable_;      // a copy of what is compressed: guest bytes may change
  std::vector<std::byte> compressed_;  // payloads of the batch, one after another
  size_t compressed_used_ = 0;
  std::vector<iovec> parts_;
  uint64_t batch_wire_bytes_ = 0;
};

}  // namespace presync
