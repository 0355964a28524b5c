#include "transport/rdma/adapter.h"

#include <errno.h>
#include <fcntl.h>

#include <algorithm>
#include <new>
#include <utility>

#include "absl/strings/str_cat.h"

namespace presync {

absl::StatusOr<MessageBuffers> MessageBuffers::Create(ibv_pd* pd, size_t count) {
  MessageBuffers buffers;
  const size_t bytes = count * kMaxMessageBytes;
  buffers.memory_.reset(new (std::align_val_t{4096}) std::byte[bytes]());
  const int access = IBV_ACCESS_LOCAL_WRITE;  // ibv_reg_mr is a macro that mixes it with others
  ibv_mr* mr = ibv_reg_mr(pd, buffers.memory_.get(), bytes, access);
  if (mr == nullptr) {
    const std::string device = ibv_get_device_name(pd->context->device);
    if (errno == ENOMEM) return LockedMemoryError(device, bytes);
    return VerbsError("register message buffers with", device, errno);
  }
  buffers.mr_ = OwnedMr(mr, {"registration of message buffers"});
  return buffers;
}

absl::StatusOr<RdmaAdapter> MakeAdapter(const CmId& id) {
  RdmaAdapter adapter;
  adapter.name = ibv_get_device_name(id->verbs->device);
  adapter.port = std::max<uint32_t>(1, id->port_num);
  adapter.iwarp = id->verbs->device->transport_type == IBV_TRANSPORT_IWARP;
  ibv_pd* pd = ibv_alloc_pd(id->verbs);
  if (pd == nullptr) return VerbsError("make a protection domain on", adapter.name, errno);
  adapter.pd = OwnedPd(pd, {"protection domain"});
  return adapter;
}

absl::Status AddQueues(RdmaAdapter* adapter, uint32_t completions, size_t buffers) {
  ibv_context* const verbs = adapter->pd->context;
  ibv_comp_channel* channel = ibv_create_comp_channel(verbs);
  if (channel == nullptr) return VerbsError("make an event channel on", adapter->name, errno);
  adapter->channel = OwnedCompChannel(channel, {"event channel"});
  ::fcntl(channel->fd, F_SETFL, ::fcntl(channel->fd, F_GETFL) | O_NONBLOCK);
  ibv_cq* cq = ibv_create_cq(verbs, static_cast<int>(completions), nullptr, channel, 0);
  if (cq == nullptr) return VerbsError("make a completion queue on", adapter->name, errno);
  adapter->cq = OwnedCq(cq, {"completion queue"});
  absl::StatusOr<MessageBuffers> made = MessageBuffers::Create(adapter->pd.get(), buffers);
  if (!made.ok()) return made.status();
  adapter->buffers = *std::move(made);
  return absl::OkStatus();
}

absl::StatusOr<uint32_t> MakeQueuePair(const CmId& id, const RdmaAdapter& adapter, uint32_t sends,
                                       uint32_t receives) {
  // Some devices refuse inline data of this length: messages then go by their buffers.
  for (const uint32_t inline_bytes : {static_cast<uint32_t>(kMaxMessageBytes), 0u}) {
    ibv_qp_init_attr attributes = {};
    attributes.send_cq = adapter.cq.get();
    attributes.recv_cq = adapter.cq.get();
    attributes.cap.max_send_wr = sends;
    attributes.cap.max_recv_wr = receives;
    attributes.cap.max_send_sge = 1;
    attributes.cap.max_recv_sge = 1;
    attributes.cap.max_inline_data = inline_bytes;
    attributes.qp_type = IBV_QPT_RC;
    if (rdma_create_qp(id.get(), adapter.pd.get(), &attributes) == 0) {
      return std::min<uint32_t>(attributes.cap.max_inline_data, kMaxMessageBytes);
    }
  }
  if (errno == ENOMEM) return LockedMemoryError(adapter.name, size_t{sends} * 1024);
  return VerbsError("make a queue pair on", adapter.name, errno);
}

uint32_t MaxSends(const RdmaAdapter& adapter) {
  ibv_device_attr attributes = {};
  if (ibv_query_device(adapter.pd->context, &attributes) != 0) return 128;
  return static_cast<uint32_t>(std::max(64, attributes.max_qp_wr));
}

bool PostReceive(ibv_qp* qp, const RdmaAdapter& adapter, size_t index, uint64_t wr_id) {
  ibv_sge sge = {};
  sge.addr = reinterpret_cast<uint64_t>(adapter.buffers.at(index));
  sge.length = kMaxMessageBytes;
  sge.lkey = adapter.buffers.key();
  ibv_recv_wr wr = {};
  wr.wr_id = wr_id;
  wr.sg_list = &sge;
  wr.num_sge = 1;
  ibv_recv_wr* bad = nullptr;
  return ibv_post_recv(qp, &wr, &bad) == 0;
}

bool PostMessage(ibv_qp* qp, const RdmaAdapter& adapter, size_t index, size_t bytes,
                 uint32_t inline_bytes, uint64_t wr_id) {
  ibv_sge sge = {};
  sge.addr = reinterpret_cast<uint64_t>(adapter.buffers.at(index));
  sge.length = static_cast<uint32_t>(bytes);
  sge.lkey = adapter.buffers.key();
  ibv_send_wr wr = {};
  wr.wr_id = wr_id;
  wr.sg_list = &sge;
  wr.num_sge = 1;
  wr.opcode = IBV_WR_SEND;
  wr.send_flags = IBV_SEND_SIGNALED;
  if (bytes <= inline_bytes) wr.send_flags |= IBV_SEND_INLINE;
  ibv_send_wr* bad = nullptr;
  return ibv_post_send(qp, &wr, &bad) == 0;
}

}  // namespace presync
