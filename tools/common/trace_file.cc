#include "tools/common/trace_file.h"

#include <zstd.h>

#include <array>
#include <cerrno>
#include <cstring>
#include <utility>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"

namespace presync {
namespace {

constexpr size_t kPieceBytes = 64 << 10;
constexpr std::array<uint8_t, 4> kZstdMagic = {0x28, 0xb5, 0x2f, 0xfd};
// 5 minutes of a small guest take a few hundred ms at this level, and it is near the best ratio.
constexpr int kZstdLevel = 12;
// The largest window a reader accepts, as log2 of bytes: bounds its memory.
constexpr int kMaxWindowLog = 27;

struct CloseFile {
  void operator()(std::FILE* file) const { std::fclose(file); }
};
struct FreeDecompressor {
  void operator()(ZSTD_DCtx* context) const { ZSTD_freeDCtx(context); }
};

absl::Status FileError(const char* verb, const std::string& path) {
  return absl::ErrnoToStatus(errno, absl::StrCat(verb, " ", path));
}

absl::Status InFile(const absl::Status& status, const std::string& path) {
  return absl::Status(status.code(), absl::StrCat(path, ": ", status.message()));
}

// Takes the file's bytes as they are stored and feeds the parser what they mean.
class Decoder {
 public:
  absl::Status Feed(absl::Span<const uint8_t> stored, TraceParser* parser) {
    if (!decompressor_) return parser->Feed(stored);
    ZSTD_inBuffer in = {stored.data(), stored.size(), 0};
    size_t made = 0;
    do {  // a full output buffer may mean that there is more without more input
      ZSTD_outBuffer out = {piece_.data(), piece_.size(), 0};
      const size_t wanted = ZSTD_decompressStream(decompressor_.get(), &out, &in);
      if (ZSTD_isError(wanted)) {
        return absl::InvalidArgumentError(absl::StrCat("malformed trace at offset ",
                                                       parser->offset(), ": zstd says ",
                                                       ZSTD_getErrorName(wanted)));
      }
      inside_frame_ = wanted != 0;
      made = out.pos;
      const auto plain = absl::MakeConstSpan(piece_.data(), out.pos);
      if (absl::Status s = parser->Feed(plain); !s.ok()) return s;
    } while (in.pos < in.size || made == piece_.size());
    return absl::OkStatus();
  }

  void ExpectZstd() {
    decompressor_.reset(ZSTD_createDCtx());
    ZSTD_DCtx_setParameter(decompressor_.get(), ZSTD_d_windowLogMax, kMaxWindowLog);
    piece_.resize(kPieceBytes);
  }

  bool inside_frame() const { return inside_frame_; }

 private:
  std::unique_ptr<ZSTD_DCtx, FreeDecompressor> decompressor_;
  std::vector<uint8_t> piece_;
  bool inside_frame_ = false;
};

}  // namespace

absl::StatusOr<Trace> ReadTraceFile(const std::string& path) {
  const std::unique_ptr<std::FILE, CloseFile> file(std::fopen(path.c_str(), "rb"));
  if (!file) return FileError("open trace", path);
  TraceParser parser;
  Decoder decoder;
  std::vector<uint8_t> piece(kPieceBytes);
  for (bool first = true;; first = false) {
    const size_t bytes = std::fread(piece.data(), 1, piece.size(), file.get());
    if (std::ferror(file.get())) return FileError("read trace", path);
    if (first && bytes >= kZstdMagic.size() &&
        std::memcmp(piece.data(), kZstdMagic.data(), kZstdMagic.size()) == 0) {
      decoder.ExpectZstd();
    }
    if (bytes == 0) break;
    const auto stored = absl::MakeConstSpan(piece.data(), bytes);
    if (absl::Status s = decoder.Feed(stored, &parser); !s.ok()) return InFile(s, path);
  }
  if (decoder.inside_frame()) {
    return InFile(
        absl::InvalidArgumentError(absl::StrCat("malformed trace at offset ", parser.offset(),
                                                ": the compressed file ends before its stream")),
        path);
  }
  absl::StatusOr<Trace> trace = std::move(parser).Finish();
  if (!trace.ok()) return InFile(trace.status(), path);
  return trace;
}

void TraceFileWriter::FreeCompressor::operator()(ZSTD_CCtx_s* compressor) const {
  ZSTD_freeCCtx(compressor);
}

TraceFileWriter::TraceFileWriter(std::string path, std::FILE* file, ZSTD_CCtx_s* compressor)
    : path_(std::move(path)), file_(file), compressor_(compressor) {}

absl::StatusOr<TraceFileWriter> TraceFileWriter::Create(const std::string& path,
                                                        const TraceHeader& header) {
  std::FILE* file = std::fopen(path.c_str(), "wb");
  if (file == nullptr) return FileError("create trace", path);
  ZSTD_CCtx* compressor = nullptr;
  if (absl::EndsWith(path, ".zst")) {
    compressor = ZSTD_createCCtx();
    ZSTD_CCtx_setParameter(compressor, ZSTD_c_compressionLevel, kZstdLevel);
    ZSTD_CCtx_setParameter(compressor, ZSTD_c_checksumFlag, 1);
  }
  TraceFileWriter writer(path, file, compressor);
  std::string bytes;
  AppendTraceHeader(header, &bytes);
  if (absl::Status s = writer.Write(bytes, false); !s.ok()) return s;
  return writer;
}

absl::Status TraceFileWriter::AddScan(absl::Span<const PageRun> written) {
  std::string bytes;
  AppendTraceScan(written, &bytes);
  return Write(bytes, false);
}

absl::Status TraceFileWriter::Close() {
  if (absl::Status s = Write("", true); !s.ok()) return s;
  return std::fclose(file_.release()) == 0 ? absl::OkStatus() : FileError("write trace", path_);
}

absl::Status TraceFileWriter::Write(const std::string& bytes, bool last) {
  if (!compressor_) return WriteFile(bytes.data(), bytes.size());
  std::array<char, kPieceBytes> piece;
  ZSTD_inBuffer in = {bytes.data(), bytes.size(), 0};
  for (bool more = true; more;) {
    ZSTD_outBuffer out = {piece.data(), piece.size(), 0};
    const size_t left =
        ZSTD_compressStream2(compressor_.get(), &out, &in, last ? ZSTD_e_end : ZSTD_e_continue);
    if (ZSTD_isError(left)) {
      return absl::InternalError(
          absl::StrCat("write trace ", path_, ": zstd says ", ZSTD_getErrorName(left)));
    }
    if (absl::Status s = WriteFile(piece.data(), out.pos); !s.ok()) return s;
    more = last ? left > 0 : in.pos < in.size;
  }
  return absl::OkStatus();
}

absl::Status TraceFileWriter::WriteFile(const void* bytes, size_t count) {
  return std::fwrite(bytes, 1, count, file_.get()) == count ? absl::OkStatus()
                                                            : FileError("write trace", path_);
}

}  // namespace presync
