// What makes a frame's payload smaller: LZ4 and zstd (level 1), each chunk by itself.
#pragma once

#include <cstddef>
#include <memory>
#include <vector>

#include "absl/status/status.h"
#include "absl/types/span.h"

namespace presync {

enum class Codec { kNone, kLz4, kZstd };

// Keeps the codecs' working memory. One thread at a time may use it.
class Compressor {
 public:
  Compressor();
  ~Compressor();
  Compressor(const Compressor&) = delete;
  Compressor& operator=(const Compressor&) = delete;

  // Compresses `in`, which must not change meanwhile, into `out`. Returns how many bytes of `out`
  // were used; 0: it does not fit (then it is not worth it). Precondition: a codec other than
  // kNone.
  size_t Compress(Codec codec, absl::Span<const std::byte> in, absl::Span<std::byte> out);

 private:
  struct State;
  const std::unique_ptr<State> state_;
};

class Decompressor {
 public:
  Decompressor();
  ~Decompressor();
  Decompressor(const Decompressor&) = delete;
  Decompressor& operator=(const Decompressor&) = delete;

  // Fills `out` exactly from `in`, whatever `in` holds: never writes outside `out`.
  // INVALID_ARGUMENT: malformed, or not exactly out.size() bytes come out; `out` then holds
  // anything.
  absl::Status Decompress(Codec codec, absl::Span<const std::byte> in, absl::Span<std::byte> out);

 private:
  struct State;
  const std::unique_ptr<State> state_;
};

}  // namespace presync
