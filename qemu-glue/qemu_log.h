// The log of a QEMU that presyncd starts. Its writer is not trusted: what it may do is write.
#pragma once

#include <cstdint>
#include <string>

#include "absl/status/statusor.h"
#include "transport/unique_fd.h"

namespace presync {

// The most that a log keeps, and what is left of it when it grew beyond that.
inline constexpr int64_t kLongestQemuLogBytes = 1 << 20;
inline constexpr int64_t kKeptQemuLogBytes = 64 << 10;

class QemuLog {
 public:
  // Opens the file for appending, or makes it (0600). FAILED_PRECONDITION: something that is no
  // plain file, or has other names, lies there (a symbolic link, for example). NOT_FOUND,
  // PERMISSION_DENIED.
  static absl::StatusOr<QemuLog> Open(const std::string& path);

  // For QEMU's output: it can be written only.
  int fd() const { return write_.get(); }
  const std::string& path() const { return path_; }

  // The end of what was written since it was opened, a few lines: of the file that was opened,
  // whatever has its name by now.
  std::string WordsSinceOpened() const;

 private:
  std::string path_;
  UniqueFd write_;
  UniqueFd read_;
  int64_t begin_ = 0;
};

// Cuts a log that has grown too long down to its end. Its QEMU, which appends, is not kept waiting
// and goes on behind what is left. Nothing happens where there is no such log.
void CutLongQemuLog(const std::string& path);

}  // namespace presync
