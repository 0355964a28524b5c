#include "qemu-glue/target_files.h"

#include <errno.h>
#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cstdio>
#include <cstring>
#include <filesystem>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "transport/unique_fd.h"

namespace presync {
namespace {

absl::Status FileError(absl::string_view what, const std::string& path, int error) {
  return absl::UnavailableError(absl::StrCat(what, " ", path, ": ", std::strerror(error)));
}

constexpr size_t kSmallBytes = 64 << 10;

absl::Status WriteFile(const std::string& path, absl::string_view text) {
  ::unlink(path.c_str());  // one that was left half-written
  const UniqueFd file(
      ::open(path.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, 0600));
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

std::string ReadSmallFile(const std::string& path) {
  const UniqueFd file(::open(path.c_str(), O_RDONLY | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC));
  struct stat st = {};
  if (!file.valid() || ::fstat(file.get(), &st) != 0 || !S_ISREG(st.st_mode) || st.st_size < 0 ||
      static_cast<size_t>(st.st_size) > kSmallBytes) {
    return "";
  }
  std::string text(static_cast<size_t>(st.st_size), '\0');
  const ssize_t n = ::pread(file.get(), text.data(), text.size(), 0);
  text.resize(n < 0 ? 0 : static_cast<size_t>(n));
  return text;
}

absl::Status MakeOwnFolder(const std::string& path, absl::string_view setting, bool shared) {
  std::error_code error;
  const std::filesystem::path parent = std::filesystem::path(path).parent_path();
  std::filesystem::create_directories(parent, error);
  if (::mkdir(path.c_str(), 0700) == 0) return absl::OkStatus();
  const int made = errno;
  const UniqueFd folder(::open(path.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  struct stat st = {};
  if (!folder.valid() || ::fstat(folder.get(), &st) != 0) {
    return FileError("make the folder", path, made);
  }
  const bool ours = st.st_uid == ::geteuid() || st.st_uid == 0;
  const bool sticky = shared && (st.st_mode & S_ISVTX) != 0;
  if (ours && ((st.st_mode & (S_IWGRP | S_IWOTH)) == 0 || sticky)) return absl::OkStatus();
  return absl::FailedPreconditionError(absl::StrFormat(
      "%s: %s is user %d's, mode %04o: somebody else than presyncd (user %d) and root may replace "
      "what lies there. See what it has, then remove it, or: chown %d %s; chmod go-w %s; or "
      "configure another %s",
      setting, path, st.st_uid, st.st_mode & 07777U, ::geteuid(), ::geteuid(), path, path,
      setting));
}

absl::Status LetThrough(const std::string& path) {
  const UniqueFd folder(::open(path.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  struct stat st = {};
  if (!folder.valid() || ::fstat(folder.get(), &st) != 0) return FileError("open", path, errno);
  if ((st.st_mode & S_IXOTH) != 0) return absl::OkStatus();
  if (::fchmod(folder.get(), (st.st_mode & 07777U) | S_IXGRP | S_IXOTH) == 0) {
    return absl::OkStatus();
  }
  return FileError("let the users of QEMUs (qemu_user) through", path, errno);
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
