#include "transport/memory.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/magic.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/vfs.h>
#include <unistd.h>

#include <algorithm>
#include <fstream>
#include <limits>
#include <optional>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_split.h"

namespace presync {
namespace {

// Memory is reserved in steps, so that a signal or a shortage shows soon and no single system call
// holds the caller for the whole guest.
constexpr uint64_t kReserveStepBytes = uint64_t{64} << 20;

std::string MiB(uint64_t bytes) { return absl::StrFormat("%.0f MiB", bytes / 1048576.0); }

absl::Status FileError(const char* operation, const std::string& path, int error) {
  return absl::ErrnoToStatus(error, absl::StrCat(operation, " ", path));
}

bool IsHugetlbfs(const struct statfs& fs) { return fs.f_type == HUGETLBFS_MAGIC; }

// The file system `fd` lies on, if it is one whose files are memory.
absl::StatusOr<struct statfs> MemoryFileSystem(int fd, const std::string& path) {
  struct statfs fs;
  if (fstatfs(fd, &fs) != 0) return FileError("statfs", path, errno);
  if (fs.f_type != TMPFS_MAGIC && !IsHugetlbfs(fs)) {
    return absl::FailedPreconditionError(absl::StrCat(
        path, " is on neither tmpfs nor hugetlbfs; guest RAM must be in memory, e.g. in /dev/shm"));
  }
  return fs;
}

absl::Status CheckSize(const std::string& path, uint64_t size_bytes, uint64_t unit_bytes) {
  if (size_bytes == 0 || size_bytes % unit_bytes != 0 ||
      size_bytes > uint64_t{std::numeric_limits<PageCount>::max()} * kPageBytes) {
    return absl::InvalidArgumentError(absl::StrCat("region ", path, ": size ", size_bytes,
                                                   " is not a positive multiple of ", unit_bytes,
                                                   " below 16 TiB"));
  }
  return absl::OkStatus();
}

// A number of a "name: value" or plain file; none where the file or the name is missing.
std::optional<uint64_t> ReadNumber(const std::string& path, const std::string& name) {
  std::ifstream file(path);
  std::string word;
  uint64_t value = 0;
  if (name.empty()) {
    if (file >> value) return value;
    return std::nullopt;
  }
  while (file >> word) {
    if (word == name && file >> value) return value;
  }
  return std::nullopt;
}

absl::Status CheckHostMemory(const std::string& path, uint64_t size_bytes,
                             const struct statfs& fs) {
  uint64_t available = std::numeric_limits<uint64_t>::max();
  std::string what;
  if (IsHugetlbfs(fs)) {
    const uint64_t page_bytes = static_cast<uint64_t>(fs.f_bsize);
    const std::string folder =
        absl::StrCat("/sys/kernel/mm/hugepages/hugepages-", page_bytes / 1024, "kB/");
    const auto free_pages = ReadNumber(folder + "free_hugepages", "");
    const auto reserved = ReadNumber(folder + "resv_hugepages", "");
    if (free_pages.has_value()) {
      available = (*free_pages - std::min(*free_pages, reserved.value_or(0))) * page_bytes;
    }
    what = absl::StrCat("in huge pages of ", page_bytes / 1024, " KiB; see vm.nr_hugepages");
  } else {
    const auto kilobytes = ReadNumber("/proc/meminfo", "MemAvailable:");
    if (kilobytes.has_value()) available = *kilobytes * 1024;
    what = "of memory";
  }
  if (available >= size_bytes) return absl::OkStatus();
  return absl::ResourceExhaustedError(absl::StrCat("region ", path, ": the guest needs ",
                                                   MiB(size_bytes), ", this host has ",
                                                   MiB(available), " free ", what));
}

// Asked before the first byte is reserved, because the answer names what is missing; the kernel's
// own refusal comes late and says only "no space".
absl::Status CheckRoom(const std::string& path, uint64_t size_bytes, const struct statfs& fs) {
  // Without a size limit the file system reports no blocks at all.
  const uint64_t room = fs.f_bavail * static_cast<uint64_t>(fs.f_bsize);
  if (fs.f_blocks != 0 && room < size_bytes) {
    return absl::ResourceExhaustedError(absl::StrCat(
        "region ", path, ": the guest needs ", MiB(size_bytes), ", its file system has ", MiB(room),
        " free; free some, or mount it with a larger size= option"));
  }
  return CheckHostMemory(path, size_bytes, fs);
}

absl::Status Reserve(int fd, const std::string& path, uint64_t size_bytes) {
  for (uint64_t offset = 0; offset < size_bytes;) {
    const uint64_t step = std::min(kReserveStepBytes, size_bytes - offset);
    if (fallocate(fd, 0, static_cast<off_t>(offset), static_cast<off_t>(step)) == 0) {
      offset += step;
      continue;
    }
    if (errno == EINTR) continue;
    if (errno == ENOSPC || errno == ENOMEM) {
      return absl::ResourceExhaustedError(absl::StrCat("region ", path, ": the guest needs ",
                                                       MiB(size_bytes), ", memory ended after ",
                                                       MiB(offset), ": ", strerror(errno)));
    }
    return FileError("reserve memory for", path, errno);
  }
  return absl::OkStatus();
}

absl::StatusOr<std::byte*> Map(int fd, const std::string& path, uint64_t size_bytes) {
  void* address = mmap(nullptr, size_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  if (address == MAP_FAILED) return FileError("map", path, errno);
  // A core dump of ours is no place for a guest's memory.
  if (madvise(address, size_bytes, MADV_DONTDUMP) != 0) {
    const absl::Status status = FileError("keep out of core dumps", path, errno);
    munmap(address, size_bytes);
    return status;
  }
  return static_cast<std::byte*>(address);
}

// Where the data (SEEK_DATA) or the hole (SEEK_HOLE) at or after `offset` begins; `end` if there is
// none before it. The descriptor's position moves, but nobody depends on it.
absl::StatusOr<uint64_t> Seek(const Region& region, uint64_t offset, uint64_t end, int whence) {
  const off_t found = lseek(region.fd(), static_cast<off_t>(offset), whence);
  if (found >= 0) return std::min(static_cast<uint64_t>(found), end);
  if (errno == ENXIO) return end;
  return FileError("look for holes in", region.path(), errno);
}

// The folder `name` in `parent`, unless it is a symbolic link: ELOOP.
UniqueFd OpenFolder(int parent, const std::string& name) {
  UniqueFd folder(openat(parent, name.c_str(), O_PATH | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC));
  if (folder.valid() || errno != ENOTDIR) return folder;
  struct stat st;
  const bool is_link =
      fstatat(parent, name.c_str(), &st, AT_SYMLINK_NOFOLLOW) == 0 && S_ISLNK(st.st_mode);
  errno = is_link ? ELOOP : ENOTDIR;
  return folder;
}

// open(2), but through no symbolic link anywhere in the path: where memory is made, nobody must be
// able to lead it elsewhere. Step by step: openat2(2) would do it at once, but systemd's
// RestrictSUIDSGID= takes it away, for its filter can't see the mode.
int CreateWithoutLinks(const std::string& path) {
  const std::vector<std::string> names = absl::StrSplit(path, '/', absl::SkipEmpty());
  UniqueFd folder(open(path[0] == '/' ? "/" : ".", O_PATH | O_DIRECTORY | O_CLOEXEC));
  for (size_t i = 0; i + 1 < names.size() && folder.valid(); ++i) {
    folder = OpenFolder(folder.get(), names[i]);
  }
  if (!folder.valid()) return -1;
  constexpr int kFlags = O_RDWR | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC;
  return openat(folder.get(), names.empty() ? "" : names.back().c_str(), kFlags, 0600);
}

// Gives a new file its size and its memory, and maps it.
absl::StatusOr<std::byte*> Fill(int fd, const std::string& path, uint64_t size_bytes) {
  auto fs = MemoryFileSystem(fd, path);
  if (!fs.ok()) return fs.status();
  if (IsHugetlbfs(*fs)) {
    auto status = CheckSize(path, size_bytes, static_cast<uint64_t>(fs->f_bsize));
    if (!status.ok()) return status;
  }
  if (auto status = CheckRoom(path, size_bytes, *fs); !status.ok()) return status;
  if (ftruncate(fd, static_cast<off_t>(size_bytes)) != 0) {
    return FileError("set the size of", path, errno);
  }
  if (auto status = Reserve(fd, path, size_bytes); !status.ok()) return status;
  return Map(fd, path, size_bytes);
}

}  // namespace

absl::StatusOr<Region> Region::Open(std::string name, const std::string& path,
                                    uint64_t size_bytes) {
  if (auto status = CheckSize(path, size_bytes, kPageBytes); !status.ok()) return status;
  // O_NONBLOCK: never wait for the other end of a FIFO that someone put here.
  UniqueFd fd(open(path.c_str(), O_RDWR | O_NOFOLLOW | O_CLOEXEC | O_NONBLOCK));
  if (!fd.valid() && (errno == ELOOP || errno == EISDIR || errno == ENXIO)) {
    return absl::FailedPreconditionError(absl::StrCat("open ", path, ": not a regular file"));
  }
  if (!fd.valid()) return FileError("open", path, errno);
  return Adopt(std::move(name), path, std::move(fd), size_bytes);
}

absl::StatusOr<Region> Region::Adopt(std::string name, const std::string& path, UniqueFd fd,
                                     uint64_t size_bytes) {
  if (auto status = CheckSize(path, size_bytes, kPageBytes); !status.ok()) return status;
  struct stat file;
  if (fstat(fd.get(), &file) != 0) return FileError("stat", path, errno);
  if (!S_ISREG(file.st_mode)) {
    return absl::FailedPreconditionError(absl::StrCat("open ", path, ": not a regular file"));
  }
  if (auto fs = MemoryFileSystem(fd.get(), path); !fs.ok()) return fs.status();
  if (static_cast<uint64_t>(file.st_size) != size_bytes) {
    return absl::FailedPreconditionError(absl::StrCat(
        "open ", path, ": the file has ", file.st_size, " bytes, the guest's region ", size_bytes));
  }
  auto data = Map(fd.get(), path, size_bytes);
  if (!data.ok()) return data.status();
  return Make(std::move(name), path, std::move(fd), *data, size_bytes);
}

absl::StatusOr<Region> Region::Create(std::string name, const std::string& path,
                                      uint64_t size_bytes) {
  if (auto status = CheckSize(path, size_bytes, kPageBytes); !status.ok()) return status;
  UniqueFd fd(CreateWithoutLinks(path));
  if (!fd.valid() && errno == ELOOP) {
    return absl::FailedPreconditionError(
        absl::StrCat("create ", path,
                     ": there is a symbolic link in its path; name the folder by its real path"));
  }
  if (!fd.valid() && errno == EEXIST) {
    return absl::AlreadyExistsError(absl::StrCat(
        "create ", path, ": a file is in the way; remove it if no guest uses it any more"));
  }
  if (!fd.valid()) return FileError("create", path, errno);
  const absl::StatusOr<std::byte*> data = Fill(fd.get(), path, size_bytes);
  if (!data.ok()) {
    unlink(path.c_str());
    return data.status();
  }
  absl::StatusOr<Region> region = Make(std::move(name), path, std::move(fd), *data, size_bytes);
  if (!region.ok()) unlink(path.c_str());
  return region;
}

absl::StatusOr<Region> Region::Make(std::string name, std::string path, UniqueFd fd,
                                    std::byte* data, uint64_t size_bytes) {
  Region region(std::move(name), std::move(path), std::move(fd), data, size_bytes);
  absl::StatusOr<FaultGuard> guard = FaultGuard::Guard(data, size_bytes);
  if (!guard.ok()) return guard.status();
  region.guard_ = *std::move(guard);
  return region;
}

absl::Status Region::Check() const {
  struct stat file = {};
  const bool shorter =
      fstat(fd_.get(), &file) != 0 || static_cast<uint64_t>(file.st_size) < size_bytes_;
  if (!shorter && !guard_.damaged()) return absl::OkStatus();
  return absl::DataLossError(absl::StrCat(
      "guest memory ", path_,
      shorter ? absl::StrCat(": the file was cut to ", file.st_size, " of ", size_bytes_,
                             " bytes, by its QEMU or by whoever may write it")
              : " can't be read any more: the file was cut for a while, or the host's memory is "
                "damaged there (the kernel's log says so)",
      "; what was read of it is not trusted"));
}

Region::Region(std::string name, std::string path, UniqueFd fd, std::byte* data,
               uint64_t size_bytes)
    : name_(std::move(name)),
      path_(std::move(path)),
      fd_(std::move(fd)),
      data_(data),
      size_bytes_(size_bytes) {}

Region::Region(Region&& other) noexcept
    : name_(std::move(other.name_)),
      path_(std::move(other.path_)),
      fd_(std::move(other.fd_)),
      data_(std::exchange(other.data_, nullptr)),
      size_bytes_(std::exchange(other.size_bytes_, 0)),
      guard_(std::move(other.guard_)) {}

Region& Region::operator=(Region&& other) noexcept {
  // What this one held goes with the temporary.
  Region taken(std::move(other));
  std::swap(name_, taken.name_);
  std::swap(path_, taken.path_);
  std::swap(fd_, taken.fd_);
  std::swap(data_, taken.data_);
  std::swap(size_bytes_, taken.size_bytes_);
  std::swap(guard_, taken.guard_);
  return *this;
}

Region::~Region() {
  guard_ = FaultGuard();
  if (data_ != nullptr) munmap(data_, size_bytes_);
}

absl::StatusOr<std::vector<PageRun>> Region::Holes(PageRun run) const {
  std::vector<PageRun> holes;
  const uint64_t end = uint64_t{run.first} * kPageBytes + PagesToBytes(run.count);
  uint64_t offset = uint64_t{run.first} * kPageBytes;
  while (offset < end) {
    auto hole = Seek(*this, offset, end, SEEK_HOLE);
    if (!hole.ok()) return hole.status();
    if (*hole == end) break;
    auto data = Seek(*this, *hole, end, SEEK_DATA);
    if (!data.ok()) return data.status();
    // A page could be filled between the two questions: then this is no hole.
    if (*data > *hole) {
      holes.push_back({static_cast<PageIndex>(*hole / kPageBytes),
                       static_cast<PageCount>((*data - *hole) / kPageBytes)});
    }
    offset = *data;
  }
  return holes;
}

absl::StatusOr<std::vector<PageRun>> Region::RecheckHoles(PageRun run) const {
  std::vector<PageRun> holes;
  const uint64_t end = uint64_t{run.first} * kPageBytes + PagesToBytes(run.count);
  uint64_t offset = uint64_t{run.first} * kPageBytes;
  while (offset < end) {
    auto data = Seek(*this, offset, end, SEEK_DATA);
    if (!data.ok()) return data.status();
    if (*data > offset) {
      holes.push_back({static_cast<PageIndex>(offset / kPageBytes),
                       static_cast<PageCount>((*data - offset) / kPageBytes)});
    }
    offset = *data + kPageBytes;
  }
  return holes;
}

absl::StatusOr<GuestMemory> GuestMemory::Create(std::vector<Region> regions) {
  if (regions.empty()) return absl::InvalidArgumentError("guest memory: no region");
  GuestMemory memory;
  uint64_t next = 0;
  for (const Region& region : regions) {
    memory.first_pages_.push_back(static_cast<PageIndex>(next));
    next += region.pages();
    if (next > std::numeric_limits<PageCount>::max()) {
      return absl::InvalidArgumentError("guest memory: 16 TiB or more in all regions");
    }
  }
  memory.first_pages_.push_back(static_cast<PageIndex>(next));
  memory.regions_ = std::move(regions);
  return memory;
}

absl::Status GuestMemory::Check() const {
  for (const Region& region : regions_) {
    if (absl::Status s = region.Check(); !s.ok()) return s;
  }
  return absl::OkStatus();
}

size_t GuestMemory::RegionOf(PageIndex page) const {
  const auto after = std::upper_bound(first_pages_.begin(), first_pages_.end(), page);
  return static_cast<size_t>(after - first_pages_.begin()) - 1;
}

bool GuestMemory::IsWithinOneRegion(PageRun run) const {
  if (run.count == 0 || run.first >= pages()) return false;
  return run.count <= first_pages_[RegionOf(run.first) + 1] - run.first;
}

absl::Span<std::byte> GuestMemory::Bytes(PageRun run) const {
  const size_t region = RegionOf(run.first);
  return {regions_[region].data() + PagesToBytes(run.first - first_pages_[region]),
          PagesToBytes(run.count)};
}

std::vector<PageRun> GuestMemory::SplitAtRegions(PageRun run) const {
  std::vector<PageRun> parts;
  while (run.count > 0) {
    const PageCount left = first_pages_[RegionOf(run.first) + 1] - run.first;
    const PageRun part{run.first, std::min(run.count, left)};
    parts.push_back(part);
    run = {part.end(), run.count - part.count};
  }
  return parts;
}

bool GuestMemory::IsWhole() const {
  constexpr uint64_t kBlockBytes = 512;  // of st_blocks: stat(2)
  return std::all_of(regions_.begin(), regions_.end(), [](const Region& region) {
    struct stat st = {};
    return ::fstat(region.fd(), &st) == 0 &&
           static_cast<uint64_t>(st.st_blocks) * kBlockBytes >= region.size_bytes();
  });
}

absl::StatusOr<std::vector<PageRun>> GuestMemory::Holes(PageRun run) const {
  return CollectHoles(run, &Region::Holes);
}

absl::StatusOr<std::vector<PageRun>> GuestMemory::RecheckHoles(PageRun run) const {
  return CollectHoles(run, &Region::RecheckHoles);
}

absl::StatusOr<std::vector<int64_t>> GuestMemory::LastDiscards() const {
  std::vector<int64_t> times;
  for (const Region& region : regions_) {
    struct stat st = {};
    if (::fstat(region.fd(), &st) != 0) {
      return absl::InternalError(absl::StrCat(region.path(), ": fstat: ", strerror(errno)));
    }
    times.push_back(absl::ToUnixNanos(absl::TimeFromTimespec(st.st_mtim)));
  }
  return times;
}

absl::StatusOr<std::vector<PageRun>> GuestMemory::CollectHoles(
    PageRun run, absl::StatusOr<std::vector<PageRun>> (Region::*ask)(PageRun) const) const {
  std::vector<PageRun> holes;
  for (const PageRun part : SplitAtRegions(run)) {
    const size_t region = RegionOf(part.first);
    const PageIndex base = first_pages_[region];
    auto found = (regions_[region].*ask)({part.first - base, part.count});
    if (!found.ok()) return found.status();
    for (const PageRun hole : *found) holes.push_back({base + hole.first, hole.count});
  }
  return holes;
}

}  // namespace presync
