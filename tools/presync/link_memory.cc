#include "tools/presync/link_memory.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cstring>
#include <memory>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_split.h"
#include "absl/strings/strip.h"
#include "transport/unique_fd.h"

namespace presync {
namespace {

absl::Status Failed(absl::string_view what, const std::string& path) {
  return absl::UnavailableError(absl::StrCat(what, " ", path, ": ", std::strerror(errno)));
}

absl::Status NotAsItMustBe(const std::string& path, absl::string_view what) {
  return absl::PermissionDeniedError(absl::StrCat(path, " ", what));
}

absl::StatusOr<UniqueFd> OpenFolder(int parent, const std::string& name, const std::string& path) {
  UniqueFd folder(::openat(parent, name.c_str(), O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC));
  if (folder.valid()) return folder;
  if (errno == ELOOP || errno == ENOTDIR) {
    return NotAsItMustBe(path, "is no folder, or a symbolic link: name it by its real path");
  }
  return Failed("open", path);
}

// Step by step, for any part of it may lie in a folder that is QEMU's user's.
absl::StatusOr<UniqueFd> OpenPath(const std::string& path) {
  UniqueFd folder(::open("/", O_PATH | O_DIRECTORY | O_CLOEXEC));
  for (const std::string& name :
       std::vector<std::string>(absl::StrSplit(path, '/', absl::SkipEmpty()))) {
    absl::StatusOr<UniqueFd> next = OpenFolder(folder.get(), name, path);
    if (!next.ok()) return next.status();
    folder = *std::move(next);
  }
  return folder;
}

absl::StatusOr<struct stat> Look(int fd, const std::string& path) {
  struct stat found = {};
  if (::fstat(fd, &found) != 0) return Failed("look at", path);
  return found;
}

// A folder that nobody but its owner may put names into. libvirt gives all of these to QEMU's user.
absl::Status CheckOwners(const struct stat& folder, const std::string& path) {
  if ((folder.st_mode & (S_IWGRP | S_IWOTH)) == 0) return absl::OkStatus();
  return NotAsItMustBe(path, absl::StrFormat("can be written by others than its owner, mode %o; "
                                             "libvirt makes it 755 or 700",
                                             folder.st_mode & 07777));
}

absl::StatusOr<UniqueFd> OpenParent(const std::string& path) {
  absl::StatusOr<UniqueFd> folder = OpenPath(path);
  if (!folder.ok()) return folder.status();
  absl::StatusOr<struct stat> found = Look(folder->get(), path);
  if (!found.ok()) return found.status();
  if (absl::Status s = CheckOwners(*found, path); !s.ok()) return s;
  return folder;
}

// NUMBER-NAME, where libvirt cuts the name after a while.
bool IsFolderOf(absl::string_view entry, const std::string& number, const std::string& name) {
  return !number.empty() && absl::ConsumePrefix(&entry, number) &&
         absl::ConsumePrefix(&entry, "-") && !entry.empty() && absl::StartsWith(name, entry);
}

absl::StatusOr<std::string> FindFolder(int parent, const std::string& path,
                                       const std::string& number, const std::string& name) {
  const int again = ::openat(parent, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  const std::unique_ptr<DIR, int (*)(DIR*)> entries(::fdopendir(again), ::closedir);
  if (entries == nullptr) return Failed("read", path);
  std::string found;
  while (const dirent* entry = ::readdir(entries.get())) {
    if (!IsFolderOf(entry->d_name, number, name)) continue;
    if (!found.empty()) {
      return NotAsItMustBe(path, absl::StrCat("has two folders for this domain: ", found, " and ",
                                              std::string(entry->d_name)));
    }
    found = entry->d_name;
  }
  if (!found.empty()) return found;
  return absl::NotFoundError(
      absl::StrCat(path, " has no folder ", number,
                   "-*: is memory_backing_dir in presyncd.toml that of libvirt's qemu.conf?"));
}

// The descriptor of the file that presyncd mirrors into, whatever the name means by now.
absl::StatusOr<UniqueFd> OpenFile(const MemoryFile& file) {
  UniqueFd fd(::open(file.path.c_str(), O_RDONLY | O_NOFOLLOW | O_NONBLOCK | O_NOCTTY | O_CLOEXEC));
  if (!fd.valid() && errno == ELOOP) return NotAsItMustBe(file.path, "is a symbolic link");
  if (!fd.valid()) return Failed("open", file.path);
  absl::StatusOr<struct stat> found = Look(fd.get(), file.path);
  if (!found.ok()) return found.status();
  if (S_ISREG(found->st_mode) && found->st_dev == file.device && found->st_ino == file.inode) {
    return fd;
  }
  return NotAsItMustBe(file.path, "is not the file that presyncd mirrors into");
}

absl::Status LinkOne(const MemoryFile& file, int folder, const struct stat& owner,
                     const std::string& folder_path) {
  const std::string to = absl::StrCat(folder_path, "/", file.name);
  if (file.name.empty() || absl::StrContains(file.name, '/') || file.name == "..") {
    return NotAsItMustBe(to, "is no name in that folder");
  }
  absl::StatusOr<UniqueFd> fd = OpenFile(file);
  if (!fd.ok()) return fd.status();
  if (::fchown(fd->get(), owner.st_uid, owner.st_gid) != 0) return Failed("chown", file.path);
  if (::fchmod(fd->get(), 0600) != 0) return Failed("chmod", file.path);
  // By its descriptor: the name may mean another file by now.
  const std::string itself = absl::StrCat("/proc/self/fd/", fd->get());
  if (::linkat(AT_FDCWD, itself.c_str(), folder, file.name.c_str(), AT_SYMLINK_FOLLOW) == 0) {
    return absl::OkStatus();
  }
  return Failed(absl::StrCat("link ", file.path, " to"), to);
}

}  // namespace

absl::Status LinkMemory(const std::string& parent, const std::string& domain_number,
                        const std::string& domain_name, const std::vector<MemoryFile>& files) {
  absl::StatusOr<UniqueFd> above = OpenParent(parent);
  if (!above.ok()) return above.status();
  absl::StatusOr<std::string> name = FindFolder(above->get(), parent, domain_number, domain_name);
  if (!name.ok()) return name.status();
  const std::string path = absl::StrCat(parent, "/", *name);
  absl::StatusOr<UniqueFd> folder = OpenFolder(above->get(), *name, path);
  if (!folder.ok()) return folder.status();
  absl::StatusOr<struct stat> owner = Look(folder->get(), path);
  if (!owner.ok()) return owner.status();
  if (absl::Status s = CheckOwners(*owner, path); !s.ok()) return s;
  for (const MemoryFile& file : files) {
    if (absl::Status s = LinkOne(file, folder->get(), *owner, path); !s.ok()) return s;
  }
  return absl::OkStatus();
}

}  // namespace presync
