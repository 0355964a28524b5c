#include "qemu-glue/mapped_file.h"

#include <dirent.h>
#include <fcntl.h>
#include <sys/stat.h>

#include <cerrno>
#include <filesystem>
#include <memory>
#include <optional>
#include <system_error>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "qemu-glue/dirty_log/guest_maps.h"

namespace presync {
namespace {

// Of a process's descriptors so many are looked at; QEMU opens its memory among the first.
constexpr int kMostDescriptors = 65536;

bool IsFile(const Mapping& mapping, const struct stat& file) {
  return mapping.device == file.st_dev && mapping.inode == file.st_ino;
}

absl::StatusOr<std::string> ReadMaps(const PeerProcess& process) {
  absl::StatusOr<std::string> text = ReadProcFile(absl::StrCat("/proc/", process.pid(), "/maps"));
  // Asked after the read: a process that still lives is the one whose memory was read of.
  if (!process.HasEnded()) return text;
  return absl::UnavailableError(absl::StrCat("QEMU (process ", process.pid(), ") has ended"));
}

// The mapping that QEMU most likely means by a path: of the file that is there now, else of one
// that had this name when it was mapped.
std::optional<Mapping> FindMapping(const std::vector<Mapping>& all, const std::string& said_path) {
  struct stat there = {};
  const bool is_there = ::stat(said_path.c_str(), &there) == 0;
  const std::string deleted = said_path + " (deleted)";
  std::optional<Mapping> by_name;
  for (const Mapping& mapping : all) {
    if (!mapping.shared || !mapping.writable || mapping.inode == 0) continue;
    if (is_there && IsFile(mapping, there)) return mapping;
    const bool named = mapping.path == said_path || mapping.path == deleted;
    if (named && !by_name.has_value()) by_name = mapping;
  }
  return by_name;
}

// Takes hold of what `link` in /proc leads to, without opening it, if that is the mapping's file.
UniqueFd Hold(const std::string& link, const Mapping& mapping) {
  UniqueFd held(::open(link.c_str(), O_PATH | O_CLOEXEC));
  struct stat file = {};
  if (!held.valid() || ::fstat(held.get(), &file) != 0) return UniqueFd();
  return S_ISREG(file.st_mode) && IsFile(mapping, file) ? std::move(held) : UniqueFd();
}

// By the mapping itself, which the kernel allows to CAP_CHECKPOINT_RESTORE and CAP_SYS_ADMIN alone
// (proc(5), map_files); else by the descriptor that QEMU keeps of its memory's file.
UniqueFd HoldFile(const PeerProcess& process, const Mapping& mapping) {
  const std::string folder = absl::StrCat("/proc/", process.pid());
  UniqueFd held = Hold(
      absl::StrCat(folder, "/map_files/", absl::Hex(mapping.start), "-", absl::Hex(mapping.end)),
      mapping);
  const std::string descriptors = folder + "/fd";
  const std::unique_ptr<DIR, int (*)(DIR*)> open(::opendir(descriptors.c_str()), ::closedir);
  for (int i = 0; i < kMostDescriptors && open != nullptr && !held.valid(); ++i) {
    const dirent* const entry = ::readdir(open.get());
    if (entry == nullptr) break;
    held = Hold(absl::StrCat(descriptors, "/", entry->d_name), mapping);
  }
  return held;
}

absl::Status IsNoMemoryOf(const PeerProcess& process, const std::string& said_path) {
  return absl::FailedPreconditionError(absl::StrCat(
      "QEMU's monitor calls ", said_path, " the guest's memory, but process ", process.pid(),
      ", which answers there, has not mapped it shared and writable: it is not this guest's. Name "
      "a monitor that the guest's own QEMU opens (-qmp unix:PATH,server=on,wait=off), no proxy"));
}

}  // namespace

absl::StatusOr<UniqueFd> OpenMappedFile(const PeerProcess& process, const std::string& said_path,
                                        uint64_t size_bytes) {
  const absl::StatusOr<std::string> maps = ReadMaps(process);
  if (!maps.ok()) return maps.status();
  const absl::StatusOr<std::vector<Mapping>> all = ParseMaps(*maps);
  if (!all.ok()) return all.status();
  const std::optional<Mapping> mapping = FindMapping(*all, said_path);
  if (!mapping.has_value()) return IsNoMemoryOf(process, said_path);
  const UniqueFd held = HoldFile(process, *mapping);
  if (!held.valid()) {
    return absl::PermissionDeniedError(absl::StrCat(
        "guest memory ", said_path, ": process ", process.pid(),
        " has mapped it, but keeps no descriptor of it that presync may use: run presyncd as root "
        "or with CAP_SYS_PTRACE and CAP_DAC_OVERRIDE"));
  }
  // Held, so its numbers are no later file's: what is mapped now under them is this one.
  if (absl::Status s = CheckMapped(process, said_path, held.get(), size_bytes); !s.ok()) return s;
  // O_NONBLOCK: a lease that its owner took on it is not waited for.
  UniqueFd file(
      ::open(absl::StrCat("/proc/self/fd/", held.get()).c_str(), O_RDWR | O_CLOEXEC | O_NONBLOCK));
  if (file.valid()) return file;
  return absl::ErrnoToStatus(errno, absl::StrCat("open ", said_path));
}

absl::StatusOr<Region> OpenMappedRegion(const PeerProcess& process, const std::string& name,
                                        const std::string& said_path, uint64_t size_bytes) {
  absl::StatusOr<UniqueFd> file = OpenMappedFile(process, said_path, size_bytes);
  if (!file.ok()) return file.status();
  // What it is really called, for who looks at the folder that it lies in.
  std::error_code error;
  const std::string path =
      std::filesystem::read_symlink(absl::StrCat("/proc/self/fd/", file->get()), error);
  return Region::Adopt(name, error ? said_path : path, *std::move(file), size_bytes);
}

absl::Status CheckMapped(const PeerProcess& process, const std::string& name, int fd,
                         uint64_t size_bytes) {
  struct stat file = {};
  if (::fstat(fd, &file) != 0) return absl::ErrnoToStatus(errno, absl::StrCat("stat ", name));
  const absl::StatusOr<std::string> maps = ReadMaps(process);
  if (!maps.ok()) return maps.status();
  const RegionFile region = {.name = name,
                             .device = file.st_dev,
                             .inode = file.st_ino,
                             .run = {0, static_cast<PageCount>(size_bytes / kPageBytes)}};
  const absl::Status mapped = FindSegments(*maps, {region}).status();
  return absl::IsNotFound(mapped) ? absl::FailedPreconditionError(mapped.message()) : mapped;
}

}  // namespace presync
