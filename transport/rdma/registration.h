// Guest memory known to one RDMA device.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "absl/functional/function_ref.h"
#include "absl/status/statusor.h"
#include "transport/memory.h"
#include "transport/rdma/verbs.h"

namespace presync {

// Regions are registered in chunks of at most this, so that progress shows and a registration can
// be called off. A multiple of every huge page there is (1 GiB on x86-64).
inline constexpr uint64_t kRegistrationChunkBytes = uint64_t{1} << 30;

// Windows and writes stay within shards: 2 MiB of a region, counted from its start. Chunks are
// multiples of it.
inline constexpr PageCount kRdmaShardPages = 512;

struct RegisteredChunk {
  size_t region = 0;
  uint64_t offset_bytes = 0;  // within the region
  uint64_t size_bytes = 0;
  OwnedMr mr;
};

enum class MemoryRights {
  kLocalRead,    // of a source: nobody outside may do anything
  kRemoteWrite,  // of a target
};

// Registers all of `memory` with `pd`, ascending. `pinned_bytes`: what will be locked in all, with
// other devices, for the text of a refusal. `progress` gets the bytes of each chunk that is done;
// false stops: CANCELLED. RESOURCE_EXHAUSTED: the limit of locked memory, with its value and the
// remedy. UNIMPLEMENTED: on-demand paging was asked for and the device has none.
absl::StatusOr<std::vector<RegisteredChunk>> RegisterMemory(
    ibv_pd* pd, const GuestMemory& memory, MemoryRights rights, bool on_demand_paging,
    uint64_t pinned_bytes, absl::FunctionRef<bool(uint64_t)> progress);

// Why memory could not be locked: names the limit, its value, what is needed and the remedy.
absl::Status LockedMemoryError(const std::string& device, uint64_t needed_bytes);

}  // namespace presync
