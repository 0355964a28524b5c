// Trace files: predictor/trace.h on disk, plain or zstd-compressed.
#pragma once

#include <cstddef>
#include <cstdio>
#include <memory>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "predictor/trace.h"

struct ZSTD_CCtx_s;

namespace presync {

// Reads a whole trace; compression is told by the file's first bytes. Blocks. NOT_FOUND,
// PERMISSION_DENIED and the like: the file can't be read; INVALID_ARGUMENT: malformed, with the
// offset in the uncompressed stream; RESOURCE_EXHAUSTED: it decompresses to more than
// kMaxTraceBytes. Every text names the file.
absl::StatusOr<Trace> ReadTraceFile(const std::string& path);

// Writes a trace scan by scan, so that a recorder holds none of it in memory. Compressed by zstd if
// the path ends in ".zst". A file that was not closed may end anywhere. Not thread-safe; calls
// block on the disk.
class TraceFileWriter final {
 public:
  // Makes or replaces `path`. Errors: of the file system.
  static absl::StatusOr<TraceFileWriter> Create(const std::string& path, const TraceHeader& header);

  // Preconditions as in Trace::AddScan (not checked here; a reader refuses what breaks them).
  absl::Status AddScan(absl::Span<const PageRun> written);

  // Writes what is left. To be called once, last.
  absl::Status Close();

 private:
  struct CloseFile {
    void operator()(std::FILE* file) const { std::fclose(file); }
  };
  struct FreeCompressor {
    void operator()(ZSTD_CCtx_s* compressor) const;
  };

  TraceFileWriter(std::string path, std::FILE* file, ZSTD_CCtx_s* compressor);
  absl::Status Write(const std::string& bytes, bool last);
  absl::Status WriteFile(const void* bytes, size_t count);

  std::string path_;
  std::unique_ptr<std::FILE, CloseFile> file_;
  std::unique_ptr<ZSTD_CCtx_s, FreeCompressor> compressor_;  // null: plain
};

}  // namespace presync
