#include "transport/durable_file.h"

#include <errno.h>
#include <fcntl.h>
#include <unistd.h>

#include <cstdio>
#include <cstring>

#include "absl/strings/str_cat.h"
#include "transport/unique_fd.h"

namespace presync {
namespace {

absl::Status FileError(absl::string_view what, absl::string_view step, const std::string& path) {
  return absl::UnavailableError(
      absl::StrCat(what, ": ", step, " ", path, ": ", std::strerror(errno)));
}

absl::Status WriteWhole(absl::string_view what, const std::string& path, absl::string_view bytes) {
  ::unlink(path.c_str());  // one that was left half-written
  const UniqueFd fd(
      ::open(path.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC | O_NOFOLLOW, 0600));
  if (!fd.valid()) return FileError(what, "make", path);
  if (::write(fd.get(), bytes.data(), bytes.size()) != static_cast<ssize_t>(bytes.size()) ||
      ::fsync(fd.get()) != 0) {
    return FileError(what, "write", path);
  }
  return absl::OkStatus();
}

}  // namespace

absl::Status ReplaceWhole(absl::string_view what, const std::string& path, const std::string& next,
                          absl::string_view bytes) {
  absl::Status written = WriteWhole(what, next, bytes);
  if (written.ok() && ::rename(next.c_str(), path.c_str()) != 0) {
    written = FileError(what, "make", path);
  }
  if (!written.ok()) ::unlink(next.c_str());
  return written;
}

absl::Status SyncFolder(absl::string_view what, const std::string& folder) {
  const UniqueFd dir(::open(folder.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  if (!dir.valid() || ::fsync(dir.get()) != 0) return FileError(what, "sync", folder);
  return absl::OkStatus();
}

}  // namespace presync
