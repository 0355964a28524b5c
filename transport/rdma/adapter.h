// What both ends of an RDMA link have of one device: protection domain, registered guest memory,
// completion queue, and buffers for messages. Owners in the order of their making.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "transport/rdma/message.h"
#include "transport/rdma/registration.h"
#include "transport/rdma/verbs.h"

namespace presync {

// Buffers of kMaxMessageBytes each, registered for this host's own use.
class MessageBuffers {
 public:
  static absl::StatusOr<MessageBuffers> Create(ibv_pd* pd, size_t count);
  std::byte* at(size_t index) const { return memory_.get() + index * kMaxMessageBytes; }
  uint32_t key() const { return mr_->lkey; }

 private:
  struct Free {
    void operator()(std::byte* p) const { ::operator delete[](p, std::align_val_t{4096}); }
  };
  std::unique_ptr<std::byte[], Free> memory_;
  OwnedMr mr_;
};

struct RdmaAdapter {
  std::string name;
  uint32_t port = 1;
  bool iwarp = false;
  OwnedPd pd;
  std::vector<RegisteredChunk> memory;
  OwnedCompChannel channel;
  OwnedCq cq;
  MessageBuffers buffers;
};

// Device, protection domain; `id` was bound to the device. The rest is left to the caller.
absl::StatusOr<RdmaAdapter> MakeAdapter(const CmId& id);

// Completion queue, its channel (not blocking) and `buffers` message buffers.
absl::Status AddQueues(RdmaAdapter* adapter, uint32_t completions, size_t buffers);

// A reliable queue pair of `id` over the adapter's objects. Returns how many bytes a send may carry
// inline, at most kMaxMessageBytes; 0: none.
absl::StatusOr<uint32_t> MakeQueuePair(const CmId& id, const RdmaAdapter& adapter, uint32_t sends,
                                       uint32_t receives);

// Largest number of sends that a queue pair of this device can hold.
uint32_t MaxSends(const RdmaAdapter& adapter);

// Hands buffer `index` to the queue pair for the next message to receive. False: it failed.
bool PostReceive(ibv_qp* qp, const RdmaAdapter& adapter, size_t index, uint64_t wr_id);

// Sends a message from buffer `index`. The buffer may be used again when the send has completed, or
// at once if it fits `inline_bytes`. False: it failed.
bool PostMessage(ibv_qp* qp, const RdmaAdapter& adapter, size_t index, size_t bytes,
                 uint32_t inline_bytes, uint64_t wr_id);

}  // namespace presync
