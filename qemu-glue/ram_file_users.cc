#include "qemu-glue/ram_file_users.h"

#include <dirent.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <memory>
#include <optional>

#include "absl/strings/ascii.h"
#include "absl/strings/str_cat.h"

namespace presync {
namespace {

// As many are named; the guest has a problem either way.
constexpr size_t kMostNamed = 8;

struct RamFile {
  std::string path;
  struct stat numbers = {};
};

// The file of `files` that `pid` writes, if any.
std::optional<std::string> WrittenBy(pid_t pid, const std::vector<RamFile>& files) {
  std::ifstream maps(absl::StrCat("/proc/", pid, "/maps"));
  for (std::string line; std::getline(maps, line);) {
    for (const RamFile& file : files) {
      const dev_t device = file.numbers.st_dev;
      if (IsSharedWritable(line, major(device), minor(device), file.numbers.st_ino)) {
        return file.path;
      }
    }
  }
  return std::nullopt;
}

std::string NameOf(pid_t pid) {
  std::ifstream comm(absl::StrCat("/proc/", pid, "/comm"));
  std::string name;
  std::getline(comm, name);
  std::replace_if(
      name.begin(), name.end(), [](unsigned char c) { return c < 0x20 || c == 0x7f; }, '?');
  return name;
}

}  // namespace

bool IsSharedWritable(const std::string& line, unsigned device_major, unsigned device_minor,
                      unsigned long inode) {
  // 7f10a000-7f20a000 rw-s 00000000 00:19 1234   /dev/shm/x
  char rights[5] = {};
  unsigned line_major = 0;
  unsigned line_minor = 0;
  unsigned long line_inode = 0;
  if (std::sscanf(line.c_str(), "%*x-%*x %4s %*x %x:%x %lu", rights, &line_major, &line_minor,
                  &line_inode) != 4) {
    return false;
  }
  return rights[1] == 'w' && rights[3] == 's' && line_major == device_major &&
         line_minor == device_minor && line_inode == inode;
}

std::vector<std::string> FindRamFileUsers(const std::vector<std::string>& paths, pid_t qemu) {
  std::vector<RamFile> files;
  for (const std::string& path : paths) {
    RamFile file = {.path = path};
    if (::stat(path.c_str(), &file.numbers) == 0 && WrittenBy(qemu, {file}).has_value()) {
      files.push_back(std::move(file));
    }
  }
  std::vector<std::string> warnings;
  const std::unique_ptr<DIR, int (*)(DIR*)> folder(::opendir("/proc"), ::closedir);
  while (folder != nullptr && !files.empty() && warnings.size() < kMostNamed) {
    const dirent* entry = ::readdir(folder.get());
    if (entry == nullptr) break;
    if (!absl::ascii_isdigit(static_cast<unsigned char>(entry->d_name[0]))) continue;
    const pid_t pid = static_cast<pid_t>(std::atoi(entry->d_name));
    if (pid == qemu || pid == ::getpid()) continue;
    if (const std::optional<std::string> file = WrittenBy(pid, files)) {
      warnings.push_back(absl::StrCat(
          "process ", pid, " (", NameOf(pid), ") has the guest's memory ", *file,
          " mapped for writing; what it writes presync does not see: end it, or launch with "
          "--verify only"));
    }
  }
  return warnings;
}

}  // namespace presync
