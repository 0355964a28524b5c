#include "transport/tcp/codec.h"

#include <lz4.h>
#include <zstd.h>

#include "absl/strings/str_cat.h"

namespace presync {
namespace {

constexpr int kZstdLevel = 1;

struct FreeZstd {
  void operator()(ZSTD_CCtx* context) const { ZSTD_freeCCtx(context); }
  void operator()(ZSTD_DCtx* context) const { ZSTD_freeDCtx(context); }
};

}  // namespace

struct Compressor::State {
  std::vector<char> lz4 = std::vector<char>(static_cast<size_t>(LZ4_sizeofState()));
  std::unique_ptr<ZSTD_CCtx, FreeZstd> zstd{ZSTD_createCCtx()};
};

Compressor::Compressor() : state_(std::make_unique<State>()) {}
Compressor::~Compressor() = default;

size_t Compressor::Compress(Codec codec, absl::Span<const std::byte> in,
                            absl::Span<std::byte> out) {
  if (codec == Codec::kLz4) {
    return static_cast<size_t>(
        LZ4_compress_fast_extState(state_->lz4.data(), reinterpret_cast<const char*>(in.data()),
                                   reinterpret_cast<char*>(out.data()), static_cast<int>(in.size()),
                                   static_cast<int>(out.size()), /*acceleration=*/1));
  }
  const size_t size = ZSTD_compressCCtx(state_->zstd.get(), out.data(), out.size(), in.data(),
                                        in.size(), kZstdLevel);
  return ZSTD_isError(size) ? 0 : size;
}

struct Decompressor::State {
  std::unique_ptr<ZSTD_DCtx, FreeZstd> zstd{ZSTD_createDCtx()};
};

Decompressor::Decompressor() : state_(std::make_unique<State>()) {}
Decompressor::~Decompressor() = default;

absl::Status Decompressor::Decompress(Codec codec, absl::Span<const std::byte> in,
                                      absl::Span<std::byte> out) {
  if (codec == Codec::kLz4) {
    const int size = LZ4_decompress_safe(reinterpret_cast<const char*>(in.data()),
                                         reinterpret_cast<char*>(out.data()),
                                         static_cast<int>(in.size()), static_cast<int>(out.size()));
    if (size == static_cast<int>(out.size())) return absl::OkStatus();
    return absl::InvalidArgumentError(
        absl::StrCat("lz4 payload of ", in.size(), " bytes gives ", size, ", not ", out.size()));
  }
  const size_t size =
      ZSTD_decompressDCtx(state_->zstd.get(), out.data(), out.size(), in.data(), in.size());
  if (size == out.size()) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat(
      "zstd payload of ", in.size(),
      " bytes: ", ZSTD_isError(size) ? ZSTD_getErrorName(size) : absl::StrCat("gives ", size),
      "; expected ", out.size()));
}

}  // namespace presync
