#include "qemu-glue/target_files.h"

#include <errno.h>
#include <fcntl.h>
#include <sys/file.h>
#include <unistd.h>

#include <cstdio>
#include <cstring>

#include "absl/strings/str_cat.h"
#include "transport/unique_fd.h"

namespace presync {
namespace {

absl::Status FileError(absl::string_view what, const std::string& path, int error) {
  return absl::UnavailableError(absl::StrCat(what, " ", path, ": ", std::strerror(error)));
}

absl::Status WriteFile(const std::string& path, absl::string_view text) {
  const UniqueFd file(::open(path.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666));
  if (!file.valid()) return FileError("write", path, errno);
  while (!text.empty()) {
    const ssize_t n = ::write(file.get(), text.data(), text.size());
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) return FileError("write", path, errno);
    text.remove_prefix(static_cast<size_t>(n));
  }
  return absl::OkStatus();
}

}  // namespace

absl::Status CheckGuestSize(const std::string& guest, const std::vector<RegionRequest>& regions,
                            uint64_t max_guest_bytes) {
  uint64_t bytes = 0;
  for (const RegionRequest& region : regions) bytes += region.size_bytes;
  if (max_guest_bytes == 0 || bytes <= max_guest_bytes) return absl::OkStatus();
  return absl::ResourceExhaustedError(
      absl::StrCat("guest ", guest, " has ", bytes >> 20, " MiB; this host accepts at most ",
                   max_guest_bytes >> 20, " MiB a guest (max_guest_memory)"));
}

absl::Status ReplaceFile(const std::string& path, absl::string_view text) {
  const std::string next = path + ".new";
  const absl::Status written = WriteFile(next, text);
  if (written.ok() && ::rename(next.c_str(), path.c_str()) == 0) return absl::OkStatus();
  const int error = errno;
  ::unlink(next.c_str());
  return written.ok() ? FileError("rename", next, error) : written;
}

absl::StatusOr<UniqueFd> LockFolder(const std::string& path, absl::string_view setting) {
  UniqueFd fd(::open(path.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  if (!fd.valid()) {
    return absl::UnavailableError(absl::StrCat("open ", path, ": ", std::strerror(errno)));
  }
  if (::flock(fd.get(), LOCK_EX | LOCK_NB) == 0) return fd;
  return absl::AlreadyExistsError(
      absl::StrCat("another presyncd uses ", path, "; stop it, or configure another ", setting));
}

absl::Status RemoveFile(const std::string& path) {
  if (::unlink(path.c_str()) == 0 || errno == ENOENT) return absl::OkStatus();
  return FileError("remove", path, errno);
}

}  // namespace presync
