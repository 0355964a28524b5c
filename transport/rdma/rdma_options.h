// What can be set about an RDMA link. Needs no RDMA library: every part of presync may include it.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "absl/time/time.h"

namespace presync {

inline constexpr uint32_t kMaxRdmaQueuePairs = 16;  // a device
inline constexpr uint32_t kMaxRdmaDevices = 8;      // of one link

// While guest memory is registered: bytes done so far, and of how many. False: stop. Called between
// chunks, by the thread that registers.
using RegisterProgress = std::function<bool(uint64_t done_bytes, uint64_t all_bytes)>;

struct RdmaSourceOptions {
  uint32_t queue_pairs = 4;          // a device
  std::vector<std::string> devices;  // only these, by name ("mlx5_0"); empty: any
  uint32_t depth = 64;               // writes under way, for each queue pair
  uint32_t signal_every = 16;        // one completion for so many writes of one doorbell
  // Longest single write; longer runs are cut. Runs that follow each other are joined up to it.
  uint64_t max_write_bytes = uint64_t{1} << 20;
  // What may be posted and not completed. A longer queue only delays what is posted after it;
  // 32 MiB is 2.7 ms at 100 Gb/s.
  uint64_t queue_bytes = uint64_t{32} << 20;
  // Without any completion or answer for so long, with some outstanding, the path is taken for
  // gone. The device's own retries are set to end about then too.
  absl::Duration stall_timeout = absl::Milliseconds(800);
  // Let the device fault pages in instead of pinning all memory. Needs a device that can.
  bool on_demand_paging = false;
  // Memory may leave the guest behind presync's back (balloon, free-page reporting): pinned
  // registrations would go on reading the old pages, so only on-demand paging is allowed.
  bool memory_may_be_discarded = false;
  RegisterProgress progress;  // may be empty
};

struct RdmaTargetOptions {
  // Local addresses to listen at, one for each device. Empty: the one where the control connection
  // arrived.
  std::vector<std::string> addresses;
  bool enabled = true;                            // false: every RDMA link is refused
  uint32_t max_queue_pairs = kMaxRdmaQueuePairs;  // a device
};

}  // namespace presync
