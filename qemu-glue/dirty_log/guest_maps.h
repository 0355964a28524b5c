// Where guest RAM lies in QEMU's address space, by /proc/PID/maps.
#pragma once

#include <sys/types.h>

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "predictor/page.h"

namespace presync {

// One region of guest RAM, known by the file behind it, and its place in the flat page space.
struct RegionFile {
  std::string name;  // for error texts
  dev_t device = 0;  // st_dev and st_ino of the file
  ino_t inode = 0;
  uint64_t block_bytes = kPageBytes;  // the file's own page size; larger on hugetlbfs
  PageRun run;                        // all its pages, as flat indices
};

// A piece of a region that is contiguous in QEMU's address space.
struct Segment {
  uint64_t address = 0;  // in QEMU
  PageRun run;           // flat; within one region
  PageIndex region_first = 0;

  uint64_t bytes() const { return PagesToBytes(run.count); }
  uint64_t AddressOf(PageIndex page) const { return address + PagesToBytes(page - run.first); }
  friend bool operator==(const Segment&, const Segment&) = default;
};

// A line of /proc/PID/maps: proc(5).
struct Mapping {
  uint64_t start = 0;
  uint64_t end = 0;
  bool writable = false;
  bool shared = false;
  uint64_t offset_bytes = 0;
  dev_t device = 0;
  ino_t inode = 0;
  std::string path;  // as the file was called; " (deleted)" behind it if it has lost its name

  uint64_t bytes() const { return end - start; }
};

// The text of a file in /proc that describes a process, which has no length to ask for.
// RESOURCE_EXHAUSTED: it has more than 64 MiB; a QEMU's has some hundred KiB, but whoever wants to
// can map a file with a long name 65,000 times. UNAVAILABLE, PERMISSION_DENIED: as open(2) says.
absl::StatusOr<std::string> ReadProcFile(const std::string& path);
// What an errno of opening or reading such a file means.
absl::Status ProcFileError(int error, const std::string& path);

// All lines of `maps` (the text of /proc/PID/maps). INVALID_ARGUMENT: one can't be read.
absl::StatusOr<std::vector<Mapping>> ParseMaps(std::string_view maps);

// Finds the shared, writable mappings of each region in `maps` (the text of /proc/PID/maps);
// adjacent ones are joined. Returns segments in ascending page order that cover every region
// exactly once. NOT_FOUND: a region, or a part of one, is not mapped (yet). FAILED_PRECONDITION: it
// is mapped twice (writes through one mapping would not be seen through the other) or privately.
// INVALID_ARGUMENT: a line of `maps` can't be read.
absl::StatusOr<std::vector<Segment>> FindSegments(std::string_view maps,
                                                  absl::Span<const RegionFile> regions);

}  // namespace presync
