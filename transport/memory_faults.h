// Guest memory that can't be read any more: its file was truncated by whoever owns it, or the
// host's memory is damaged there. The kernel says so by SIGBUS, at any read of any thread, which
// would end this process and with it the syncs of all other guests.
#pragma once

#include <cstddef>

#include "absl/status/statusor.h"

namespace presync {

// A mapping whose faults harm nobody else: at the first one zeros are mapped over all of it, so
// that whoever reads or writes it goes on, and it is damaged from then on. What was read since is
// worthless; whoever uses the mapping asks `damaged` before anything rests on its bytes. Movable.
class FaultGuard {
 public:
  FaultGuard() = default;
  // Guards [address, address + bytes), a mapping of the caller's. The first call takes SIGBUS over
  // for this process; faults elsewhere do what they did before. RESOURCE_EXHAUSTED: too many
  // mappings (kMostGuards).
  static absl::StatusOr<FaultGuard> Guard(std::byte* address, size_t bytes);

  FaultGuard(FaultGuard&& other) noexcept;
  FaultGuard& operator=(FaultGuard&& other) noexcept;
  ~FaultGuard();  // before the mapping goes

  // Any thread.
  bool damaged() const;

  // 256 regions of some guests are far from it.
  static constexpr size_t kMostGuards = 4096;

 private:
  explicit FaultGuard(int slot) : slot_(slot) {}
  int slot_ = -1;
};

// The kernel could not read or write at `address` for a system call (EFAULT): if that is a guarded
// mapping, it is damaged. Any thread.
void NoteUnreadable(const void* address);

}  // namespace presync
