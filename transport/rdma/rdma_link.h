// The RDMA link without a word of verbs: what the sessions need to bring one up. Behind it stand
// rdma_source_link.h and rdma_target_link.h, or, in a build without rdma-core, a plain refusal
// (UNIMPLEMENTED). docs/rdma-link.md tells how the link works.
//
// Bringing up: the target registers its guest memory and listens (ListenRdma); its *offer* goes to
// the source over the control connection; the source registers its own memory and connects
// (ConnectRdma), each queue pair with the offer's token; the target has them all (AwaitSource).
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "transport/link.h"
#include "transport/memory.h"
#include "transport/rdma/rdma_options.h"
#include "transport/wire/preamble.h"

namespace presync {

// A piece of the target's guest RAM that one device may write to.
struct RdmaWindow {
  uint32_t region = 0;
  uint64_t offset_bytes = 0;
  uint64_t size_bytes = 0;
  uint64_t address = 0;
  uint32_t key = 0;
};

// One device of the target. Its windows cover every region, ascending.
struct RdmaEndpoint {
  std::string address;  // numeric
  uint16_t port = 0;
  std::string device;
  std::vector<RdmaWindow> windows;
};

struct RdmaOffer {
  SessionToken token = {};
  uint32_t queue_pairs = 0;  // at most so many, a device
  std::vector<RdmaEndpoint> endpoints;
};

struct RdmaSource {
  std::unique_ptr<SourceLink> link;
  std::vector<std::string> devices;  // those of this host, by name
};

// How long bringing a link up may take: registering memory takes some 0.1 s a GiB.
inline absl::Duration RdmaTimeout(const GuestMemory& memory) {
  return absl::Seconds(20) + absl::Seconds(1) * (PagesToBytes(memory.pages()) >> 30);
}

// Whether this build and this host can do RDMA at all. UNIMPLEMENTED with what was looked for.
absl::Status CheckRdma(const std::vector<std::string>& devices);

// The source's end, over `memory`, which must outlive the link. Blocks: registers all memory first.
// UNIMPLEMENTED: no device for it, or one that lacks what was asked.
// RESOURCE_EXHAUSTED: too little may be locked, with the limit and the remedy.
// PERMISSION_DENIED: the target refused the connection. UNAVAILABLE, DEADLINE_EXCEEDED: it can't be
// reached. CANCELLED: `options.progress` said so. INVALID_ARGUMENT: an offer that makes no sense.
absl::StatusOr<RdmaSource> ConnectRdma(const GuestMemory* memory, const RdmaOffer& offer,
                                       const RdmaSourceOptions& options, absl::Time deadline);

// The target's end while it waits for its source, and after.
class RdmaTarget : public TargetLink {
 public:
  virtual const RdmaOffer& offer() const = 0;
  // Waits until all queue pairs are connected; nobody else can connect from then on.
  // DEADLINE_EXCEEDED: they are not; else as health(). Close, from another thread, ends it.
  virtual absl::Status AwaitSource(absl::Time deadline) = 0;
};

struct RdmaListen {
  std::vector<std::string> addresses;  // numeric, one a device
  SessionToken token = {};
  uint32_t queue_pairs = 4;  // at most, a device
  RegisterProgress progress;
};

// Registers `memory`, which must outlive what is returned, for remote writing by whoever connects
// with the token, and listens. Errors as ConnectRdma; ALREADY_EXISTS and the like: the system's.
absl::StatusOr<std::unique_ptr<RdmaTarget>> ListenRdma(const GuestMemory* memory,
                                                       const RdmaListen& listen);

}  // namespace presync
