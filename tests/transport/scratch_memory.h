// Guest memory for tests, and a guest's own view of it: a second mapping of the same files, which
// is how a real guest's bytes change under a link's feet (and what keeps ThreadSanitizer from
// reporting the races that the link's contract allows).
#pragma once

#include <unistd.h>

#include <cstddef>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "transport/memory.h"
#include "transport/memory_faults.h"

namespace presync {

// A path in /dev/shm that no other test, process or call uses.
std::string ScratchPath();

class ScratchMemory {
 public:
  // One region for each count of pages, all zero. The files have no name any more when it returns.
  static absl::StatusOr<std::unique_ptr<ScratchMemory>> Create(
      const std::vector<PageCount>& region_pages);
  ScratchMemory(const ScratchMemory&) = delete;
  ScratchMemory& operator=(const ScratchMemory&) = delete;
  ~ScratchMemory();

  const GuestMemory& memory() const { return memory_; }
  // The guest's view of a page; runs over region borders are not contiguous in it.
  std::byte* GuestPage(PageIndex page) const;
  // Fills a page as the guest with bytes that depend on `value` and do not compress.
  void FillPage(PageIndex page, uint64_t value) const;
  void ZeroPage(PageIndex page) const;
  bool PageEquals(PageIndex page, const ScratchMemory& other) const;
  bool IsZeroPage(PageIndex page) const;
  // Pages that differ from the other's.
  std::vector<PageIndex> Differences(const ScratchMemory& other) const;

 private:
  explicit ScratchMemory(GuestMemory memory) : memory_(std::move(memory)) {}
  GuestMemory memory_;
  std::vector<std::byte*> views_;
  std::vector<FaultGuard> guards_;  // of the views, for tests that cut the files
};

}  // namespace presync
