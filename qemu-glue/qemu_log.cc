#include "qemu-glue/qemu_log.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/ascii.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_replace.h"
#include "transport/printable.h"

namespace presync {
namespace {

constexpr int64_t kLastWordsBytes = 2000;

// O_NONBLOCK: never wait for the other end of a FIFO that somebody put here.
constexpr int kAsItIs = O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK;

absl::Status OpenError(const std::string& path, int error) {
  const std::string text = absl::StrCat("start QEMU: open its log ", path);
  if (error != ELOOP && error != ENXIO && error != EISDIR) return absl::ErrnoToStatus(error, text);
  return absl::FailedPreconditionError(absl::StrCat(text, ": it is no plain file; remove it"));
}

std::string ReadAt(int fd, int64_t begin, int64_t bytes) {
  std::string text(static_cast<size_t>(bytes), '\0');
  const ssize_t n = ::pread(fd, text.data(), text.size(), begin);
  text.resize(n < 0 ? 0 : static_cast<size_t>(n));
  return text;
}

bool IsPlainFile(int fd, struct stat* st) {
  return ::fstat(fd, st) == 0 && S_ISREG(st->st_mode) && st->st_nlink == 1;
}

}  // namespace

absl::StatusOr<QemuLog> QemuLog::Open(const std::string& path) {
  QemuLog log;
  log.path_ = path;
  log.write_.reset(::open(path.c_str(), O_WRONLY | O_CREAT | O_APPEND | kAsItIs, 0600));
  if (!log.write_.valid()) return OpenError(path, errno);
  log.read_.reset(::open(path.c_str(), O_RDONLY | kAsItIs));
  if (!log.read_.valid()) return OpenError(path, errno);
  struct stat written = {};
  struct stat read = {};
  if (!IsPlainFile(log.write_.get(), &written) || !IsPlainFile(log.read_.get(), &read) ||
      written.st_ino != read.st_ino || written.st_dev != read.st_dev) {
    return OpenError(path, ELOOP);
  }
  log.begin_ = read.st_size;
  return log;
}

std::string QemuLog::WordsSinceOpened() const {
  struct stat st = {};
  if (::fstat(read_.get(), &st) != 0) return "";
  const int64_t size = st.st_size;
  const int64_t begin = begin_ <= size ? begin_ : 0;  // it was cut
  const int64_t from = std::max(begin, size - kLastWordsBytes);
  const std::string words = ReadAt(read_.get(), from, size - from);
  return PrintableText(absl::StrReplaceAll(absl::StripAsciiWhitespace(words), {{"\n", "; "}}));
}

void CutLongQemuLog(const std::string& path) {
  const UniqueFd fd(::open(path.c_str(), O_RDWR | O_APPEND | kAsItIs));
  struct stat st = {};
  if (!fd.valid() || !IsPlainFile(fd.get(), &st) || st.st_size <= kLongestQemuLogBytes) return;
  const int64_t cut = st.st_size - kKeptQemuLogBytes;
  const std::string text = absl::StrCat("[presyncd: ", cut, " bytes of this log were cut here]\n",
                                        ReadAt(fd.get(), cut, kKeptQemuLogBytes));
  if (::ftruncate(fd.get(), 0) != 0) return;
  (void)!::write(fd.get(), text.data(), text.size());
}

}  // namespace presync
