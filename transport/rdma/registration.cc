#include "transport/rdma/registration.h"

#include <errno.h>
#include <sys/resource.h>

#include <algorithm>
#include <fstream>
#include <string>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"

namespace presync {
namespace {

constexpr uint64_t kShardBytes = kRdmaShardPages * kPageBytes;
static_assert(kRegistrationChunkBytes % kShardBytes == 0);

std::string MiB(uint64_t bytes) { return absl::StrFormat("%.1f MiB", bytes / 1048576.0); }

struct LockState {
  bool unlimited = false;     // this thread may lock any amount of memory
  uint64_t locked_bytes = 0;  // by devices, for this process, now
};

LockState ReadLockState() {
  LockState state;
  std::ifstream status("/proc/thread-self/status");
  constexpr uint64_t kIpcLock = uint64_t{1} << 14;  // CAP_IPC_LOCK
  for (std::string word; status >> word;) {
    uint64_t value = 0;
    if (word == "CapEff:" && status >> std::hex >> value) state.unlimited = value & kIpcLock;
    if (word == "VmPin:" && status >> std::dec >> value) state.locked_bytes = value << 10;
  }
  return state;
}

absl::StatusOr<int> AccessFlags(ibv_pd* pd, MemoryRights rights, bool on_demand_paging) {
  int access = 0;
  if (rights == MemoryRights::kRemoteWrite) {
    // Relaxed ordering may reorder writes among each other, which nothing here relies on; a message
    // is still received only after the writes before it on its queue pair are in memory.
    access = IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_REMOTE_WRITE | IBV_ACCESS_RELAXED_ORDERING;
  }
  if (!on_demand_paging) return access;
  ibv_device_attr_ex attributes = {};
  if (ibv_query_device_ex(pd->context, nullptr, &attributes) != 0 ||
      (attributes.odp_caps.general_caps & IBV_ODP_SUPPORT) == 0 ||
      (attributes.odp_caps.per_transport_caps.rc_odp_caps & IBV_ODP_SUPPORT_WRITE) == 0) {
    return absl::UnimplementedError(absl::StrCat("rdma link: the device ",
                                                 ibv_get_device_name(pd->context->device),
                                                 " has no on-demand paging for writes"));
  }
  return access | IBV_ACCESS_ON_DEMAND;
}

uint64_t ChunkBytes(ibv_pd* pd) {
  ibv_device_attr attributes = {};
  if (ibv_query_device(pd->context, &attributes) != 0) return kRegistrationChunkBytes;
  const uint64_t most = attributes.max_mr_size - attributes.max_mr_size % kShardBytes;
  return most == 0 ? kRegistrationChunkBytes : std::min(most, kRegistrationChunkBytes);
}

}  // namespace

absl::Status LockedMemoryError(const std::string& device, uint64_t needed_bytes) {
  rlimit limit = {};
  ::getrlimit(RLIMIT_MEMLOCK, &limit);
  const LockState state = ReadLockState();
  if (limit.rlim_cur == RLIM_INFINITY || state.unlimited) {
    return absl::ResourceExhaustedError(
        absl::StrCat("rdma link: ", device, " could not register guest memory (", MiB(needed_bytes),
                     " in all): out of memory on this host or of entries on the device"));
  }
  return absl::ResourceExhaustedError(absl::StrCat(
      "rdma link: ", device, " could not register guest memory: the limit of locked memory ",
      "(RLIMIT_MEMLOCK) is ", MiB(limit.rlim_cur), ", ", MiB(state.locked_bytes),
      " of it are in use, and ", MiB(needed_bytes),
      " have to be locked in all for this link. Raise it: LimitMEMLOCK=infinity in presyncd's "
      "unit, or ulimit -l "
      "unlimited before presyncd is started, or give presyncd CAP_IPC_LOCK"));
}

absl::StatusOr<std::vector<RegisteredChunk>> RegisterMemory(
    ibv_pd* pd, const GuestMemory& memory, MemoryRights rights, bool on_demand_paging,
    uint64_t pinned_bytes, absl::FunctionRef<bool(uint64_t)> progress) {
  const std::string device = ibv_get_device_name(pd->context->device);
  const absl::StatusOr<int> access = AccessFlags(pd, rights, on_demand_paging);
  if (!access.ok()) return access.status();
  const uint64_t chunk_bytes = ChunkBytes(pd);
  std::vector<RegisteredChunk> chunks;
  for (size_t r = 0; r < memory.regions().size(); ++r) {
    const Region& region = memory.regions()[r];
    for (uint64_t offset = 0; offset < region.size_bytes(); offset += chunk_bytes) {
      const uint64_t size = std::min(chunk_bytes, region.size_bytes() - offset);
      ibv_mr* mr = ibv_reg_mr(pd, region.data() + offset, size, *access);
      if (mr == nullptr) {
        if (errno == ENOMEM) return LockedMemoryError(device, pinned_bytes);
        return VerbsError(absl::StrCat("register ", region.path(), " with"), device, errno);
      }
      chunks.push_back({.region = r,
                        .offset_bytes = offset,
                        .size_bytes = size,
                        .mr = OwnedMr(mr, {"memory registration"})});
      if (!progress(size))
        return absl::CancelledError("rdma link: the registration was called off");
    }
  }
  return chunks;
}

}  // namespace presync
