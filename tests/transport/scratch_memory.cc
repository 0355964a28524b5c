#include "tests/transport/scratch_memory.h"

#include <errno.h>
#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <random>
#include <utility>

#include "absl/strings/str_cat.h"

namespace presync {

std::string ScratchPath() {
  static std::atomic<int> next = 0;
  return absl::StrCat("/dev/shm/presync-test-", getpid(), "-", next++);
}

absl::StatusOr<std::unique_ptr<ScratchMemory>> ScratchMemory::Create(
    const std::vector<PageCount>& region_pages) {
  std::vector<Region> regions;
  for (const PageCount pages : region_pages) {
    const std::string path = ScratchPath();
    auto region = Region::Create(absl::StrCat("ram", regions.size()), path, PagesToBytes(pages));
    if (!region.ok()) return region.status();
    unlink(path.c_str());
    regions.push_back(*std::move(region));
  }
  auto memory = GuestMemory::Create(std::move(regions));
  if (!memory.ok()) return memory.status();
  auto scratch = std::unique_ptr<ScratchMemory>(new ScratchMemory(*std::move(memory)));
  for (const Region& region : scratch->memory_.regions()) {
    void* view =
        mmap(nullptr, region.size_bytes(), PROT_READ | PROT_WRITE, MAP_SHARED, region.fd(), 0);
    if (view == MAP_FAILED) return absl::ErrnoToStatus(errno, "map a second view");
    scratch->views_.push_back(static_cast<std::byte*>(view));
    auto guard = FaultGuard::Guard(scratch->views_.back(), region.size_bytes());
    if (!guard.ok()) return guard.status();
    scratch->guards_.push_back(*std::move(guard));
  }
  return scratch;
}

ScratchMemory::~ScratchMemory() {
  guards_.clear();
  for (size_t i = 0; i < views_.size(); ++i) munmap(views_[i], memory_.regions()[i].size_bytes());
}

std::byte* ScratchMemory::GuestPage(PageIndex page) const {
  const size_t region = memory_.RegionOf(page);
  return views_[region] + PagesToBytes(page - memory_.FirstPage(region));
}

void ScratchMemory::FillPage(PageIndex page, uint64_t value) const {
  std::mt19937_64 random(value * 0x9e3779b97f4a7c15 + page);
  std::byte* bytes = GuestPage(page);
  for (uint64_t i = 0; i < kPageBytes; i += sizeof(uint64_t)) {
    const uint64_t word = random();
    memcpy(bytes + i, &word, sizeof(word));
  }
}

void ScratchMemory::ZeroPage(PageIndex page) const { memset(GuestPage(page), 0, kPageBytes); }

bool ScratchMemory::PageEquals(PageIndex page, const ScratchMemory& other) const {
  return memcmp(GuestPage(page), other.GuestPage(page), kPageBytes) == 0;
}

bool ScratchMemory::IsZeroPage(PageIndex page) const {
  const std::byte* bytes = GuestPage(page);
  return std::all_of(bytes, bytes + kPageBytes, [](std::byte b) { return b == std::byte{0}; });
}

std::vector<PageIndex> ScratchMemory::Differences(const ScratchMemory& other) const {
  std::vector<PageIndex> pages;
  for (PageIndex page = 0; page < memory_.pages(); ++page) {
    if (!PageEquals(page, other)) pages.push_back(page);
  }
  return pages;
}

}  // namespace presync
