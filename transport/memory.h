// Guest RAM as this process sees it: the files that back it, mapped once and shared with QEMU. That
// mapping is the zero-copy view: what a link sends or receives goes straight from or to it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "predictor/page.h"
#include "transport/memory_faults.h"
#include "transport/unique_fd.h"

namespace presync {

// One contiguous piece of guest RAM: one file on tmpfs or hugetlbfs, mapped MAP_SHARED. Owns the
// descriptor and the mapping. Movable; the mapping's address stays.
//
// Reading a hole of a tmpfs file through a mapping allocates a page in it: ask Holes first. Bytes
// that can't be read any more read as zeros from then on: see Check.
class Region {
 public:
  // Opens an existing file (never a symbolic link) that must be exactly `size_bytes` long, a
  // multiple of 4096. NOT_FOUND, PERMISSION_DENIED; FAILED_PRECONDITION: not a regular file on
  // tmpfs or hugetlbfs, or another length; INVALID_ARGUMENT: `size_bytes` is 0 or no multiple.
  static absl::StatusOr<Region> Open(std::string name, const std::string& path,
                                     uint64_t size_bytes);

  // The same with a file that is open already, for reading and writing; `path` is for texts only.
  static absl::StatusOr<Region> Adopt(std::string name, const std::string& path, UniqueFd fd,
                                      uint64_t size_bytes);

  // Creates the file (mode 0600, it must not exist) and reserves all its memory, zeroed, so that a
  // sync can't run out of it. Blocks: a second for some GiB. ALREADY_EXISTS: a file is in the way.
  // RESOURCE_EXHAUSTED: too little memory on the host or room in the file system.
  // FAILED_PRECONDITION: neither tmpfs nor hugetlbfs, or a symbolic link is in the path.
  // INVALID_ARGUMENT: a size of 0, or no multiple of the pages there. A failure leaves nothing.
  static absl::StatusOr<Region> Create(std::string name, const std::string& path,
                                       uint64_t size_bytes);

  Region(Region&& other) noexcept;
  Region& operator=(Region&& other) noexcept;
  ~Region();

  const std::string& name() const { return name_; }  // QEMU's id of the memory backend
  const std::string& path() const { return path_; }
  int fd() const { return fd_.get(); }
  std::byte* data() const { return data_; }
  uint64_t size_bytes() const { return size_bytes_; }
  PageCount pages() const { return static_cast<PageCount>(size_bytes_ / kPageBytes); }

  // Ok while all of it can be read. DATA_LOSS: the file is shorter than it was, or a page of it is
  // damaged; what was read of it lately may be anything.
  absl::Status Check() const;

  // The holes in pages [run.first, run.end()) of this region (indices within the region): pages
  // that were never touched since the file was made or the hole punched, and read as zero;
  // ascending, maximal. Walks the file: about 50 ns a populated page. On hugetlbfs no hole is ever
  // found.
  // The kernel walks on to the next hole, beyond `run` too: ask for much at once.
  absl::StatusOr<std::vector<PageRun>> Holes(PageRun run) const;

  // The same for pages that were a hole a while ago: never walks beyond `run`, but costs a system
  // call (some 0.3 us) for each page that is none any more.
  absl::StatusOr<std::vector<PageRun>> RecheckHoles(PageRun run) const;

 private:
  Region(std::string name, std::string path, UniqueFd fd, std::byte* data, uint64_t size_bytes);
  // Of a mapping that was just made; unmaps it when it fails.
  static absl::StatusOr<Region> Make(std::string name, std::string path, UniqueFd fd,
                                     std::byte* data, uint64_t size_bytes);
  std::string name_;
  std::string path_;
  UniqueFd fd_;
  std::byte* data_ = nullptr;
  uint64_t size_bytes_ = 0;
  FaultGuard guard_;
};

// All regions of one guest, in an order that both hosts agreed on, and the flat page space over
// them. Immutable after it is made, so any thread may use it.
class GuestMemory {
 public:
  // INVALID_ARGUMENT: no region, or more than 2^32 - 1 pages in all.
  static absl::StatusOr<GuestMemory> Create(std::vector<Region> regions);

  absl::Span<const Region> regions() const { return regions_; }
  PageCount pages() const { return first_pages_.back(); }
  // First flat page of region `index`; FirstPage(regions().size()) is pages().
  PageIndex FirstPage(size_t index) const { return first_pages_[index]; }

  // Ok while all regions can be read; else as Region::Check. Some microseconds.
  absl::Status Check() const;

  // Which region holds `page`. Precondition: page < pages().
  size_t RegionOf(PageIndex page) const;

  // Whether `run` is not empty and lies within one region: what a link may be asked to write.
  bool IsWithinOneRegion(PageRun run) const;

  // The bytes of `run`. Precondition: IsWithinOneRegion(run).
  absl::Span<std::byte> Bytes(PageRun run) const;

  // `run` cut at region borders. Precondition: run.end() <= pages().
  std::vector<PageRun> SplitAtRegions(PageRun run) const;

  // Whether the files have all of their memory, as those that Region::Create made have until
  // somebody frees some of it. Two microseconds a region.
  bool IsWhole() const;

  // Holes of the files within `run`, as flat runs. See Region::Holes.
  absl::StatusOr<std::vector<PageRun>> Holes(PageRun run) const;
  // See Region::RecheckHoles.
  absl::StatusOr<std::vector<PageRun>> RecheckHoles(PageRun run) const;

  // When a page of each region was last discarded, in nanoseconds of the file system's clock, or
  // written by write(2): the files' time of change, which writes through mappings leave alone on
  // tmpfs. Two discards within some milliseconds may have the same time.
  absl::StatusOr<std::vector<int64_t>> LastDiscards() const;

 private:
  GuestMemory() = default;
  absl::StatusOr<std::vector<PageRun>> CollectHoles(
      PageRun run, absl::StatusOr<std::vector<PageRun>> (Region::*ask)(PageRun) const) const;
  std::vector<Region> regions_;
  std::vector<PageIndex> first_pages_;
};

}  // namespace presync
