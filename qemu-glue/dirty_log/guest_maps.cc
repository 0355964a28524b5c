#include "qemu-glue/dirty_log/guest_maps.h"

#include <fcntl.h>
#include <sys/sysmacros.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cinttypes>
#include <cstdio>
#include <optional>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "transport/unique_fd.h"

namespace presync {
namespace {

constexpr size_t kMostProcBytes = size_t{64} << 20;

std::optional<Mapping> ParseLine(const std::string& line) {
  Mapping m;
  char permissions[5] = {};
  unsigned device_major = 0;
  unsigned device_minor = 0;
  uint64_t inode = 0;
  int path_begin = 0;
  if (std::sscanf(line.c_str(), "%" SCNx64 "-%" SCNx64 " %4s %" SCNx64 " %x:%x %" SCNu64 " %n",
                  &m.start, &m.end, permissions, &m.offset_bytes, &device_major, &device_minor,
                  &inode, &path_begin) != 7 ||
      m.end <= m.start || (m.start | m.end | m.offset_bytes) % kPageBytes != 0) {
    return std::nullopt;
  }
  m.writable = permissions[1] == 'w';
  m.shared = permissions[3] == 's';
  m.device = makedev(device_major, device_minor);
  m.inode = inode;
  m.path = line.substr(static_cast<size_t>(path_begin));
  return m;
}

std::string Name(const RegionFile& region) { return absl::StrCat("guest RAM '", region.name, "'"); }

// The writable shared mappings of one region's file, by offset.
absl::StatusOr<std::vector<Mapping>> MappingsOf(const RegionFile& region,
                                                const std::vector<Mapping>& all) {
  std::vector<Mapping> found;
  bool privately = false;
  for (const Mapping& m : all) {
    if (m.device != region.device || m.inode != region.inode || !m.writable) continue;
    if (m.shared) {
      found.push_back(m);
    } else {
      privately = true;
    }
  }
  if (privately) {
    return absl::FailedPreconditionError(absl::StrCat(
        Name(region), " is mapped privately by QEMU: its memory backend needs share=on"));
  }
  std::sort(found.begin(), found.end(),
            [](const Mapping& a, const Mapping& b) { return a.offset_bytes < b.offset_bytes; });
  return found;
}

absl::Status AppendSegments(const RegionFile& region, const std::vector<Mapping>& mappings,
                            std::vector<Segment>* segments) {
  const uint64_t size = PagesToBytes(region.run.count);
  uint64_t reached = 0;  // bytes of the file that are covered
  for (const Mapping& m : mappings) {
    if (m.offset_bytes < reached) {
      return absl::FailedPreconditionError(
          absl::StrCat(Name(region), " is mapped twice by QEMU at offset ", m.offset_bytes,
                       ": writes through one mapping can't be seen through the other. Is it the "
                       "memory of two devices?"));
    }
    if (m.offset_bytes > reached) break;
    if (m.bytes() > size - reached) {
      return absl::FailedPreconditionError(absl::StrCat(
          Name(region), " is mapped by QEMU beyond the ", size, " bytes that presync knows of"));
    }
    const auto pages = static_cast<PageCount>(m.bytes() / kPageBytes);
    const auto first = static_cast<PageIndex>(region.run.first + reached / kPageBytes);
    if (reached > 0 && segments->back().address + segments->back().bytes() == m.start) {
      segments->back().run.count += pages;
    } else {
      segments->push_back({m.start, {first, pages}, region.run.first});
    }
    reached += m.bytes();
  }
  if (reached == size) return absl::OkStatus();
  return absl::NotFoundError(absl::StrCat(Name(region), " is not mapped by QEMU at offset ",
                                          reached, " of ", size, ": is it another guest's file?"));
}

}  // namespace

absl::Status ProcFileError(int error, const std::string& path) {
  if (error == EACCES || error == EPERM) {
    return absl::PermissionDeniedError(absl::StrCat(
        "opening ", path,
        ": no right to look at QEMU's memory: run presyncd as root or with CAP_SYS_PTRACE"));
  }
  if (error == ENOENT || error == ESRCH) {
    return absl::UnavailableError(absl::StrCat("opening ", path, ": QEMU's process is gone"));
  }
  return absl::ErrnoToStatus(error, absl::StrCat("opening ", path));
}

absl::StatusOr<std::string> ReadProcFile(const std::string& path) {
  const UniqueFd fd(::open(path.c_str(), O_RDONLY | O_CLOEXEC));
  if (!fd.valid()) return ProcFileError(errno, path);
  std::string text;
  char piece[16384];
  while (text.size() <= kMostProcBytes) {
    const ssize_t bytes = ::read(fd.get(), piece, sizeof(piece));
    if (bytes == 0) return text;
    if (bytes > 0) {
      text.append(piece, static_cast<size_t>(bytes));
    } else if (errno != EINTR) {
      return ProcFileError(errno, path);
    }
  }
  return absl::ResourceExhaustedError(
      absl::StrCat(path, " has more than ", kMostProcBytes >> 20, " MiB: that is no QEMU's"));
}

absl::StatusOr<std::vector<Mapping>> ParseMaps(std::string_view maps) {
  std::vector<Mapping> all;
  for (const auto line : absl::StrSplit(absl::string_view(maps.data(), maps.size()), '\n')) {
    if (line.empty()) continue;
    const std::optional<Mapping> mapping = ParseLine(std::string(line));
    if (!mapping.has_value()) {
      return absl::InvalidArgumentError(
          absl::StrCat("QEMU's memory map has a line of another form: ", line));
    }
    all.push_back(*mapping);
  }
  return all;
}

absl::StatusOr<std::vector<Segment>> FindSegments(std::string_view maps,
                                                  absl::Span<const RegionFile> regions) {
  const absl::StatusOr<std::vector<Mapping>> all = ParseMaps(maps);
  if (!all.ok()) return all.status();
  std::vector<Segment> segments;
  for (const RegionFile& region : regions) {
    const absl::StatusOr<std::vector<Mapping>> mappings = MappingsOf(region, *all);
    if (!mappings.ok()) return mappings.status();
    const absl::Status appended = AppendSegments(region, *mappings, &segments);
    if (!appended.ok()) return appended;
  }
  std::sort(segments.begin(), segments.end(),
            [](const Segment& a, const Segment& b) { return a.run.first < b.run.first; });
  return segments;
}

}  // namespace presync
