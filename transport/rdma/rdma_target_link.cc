// The target's thread: connections, messages and their answers.
#include "transport/rdma/rdma_target_link.h"

#include <poll.h>

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "transport/rdma/work_request_id.h"
#include "transport/zero_run.h"

namespace presync {
namespace {

constexpr int kPollBatch = 16;

}  // namespace

void RdmaTargetLink::Run() {
  std::vector<pollfd> fds = {{.fd = stop_.get(), .events = POLLIN, .revents = 0},
                             {.fd = channel_->fd(), .events = POLLIN, .revents = 0}};
  for (const Device& device : devices_) {
    fds.push_back({.fd = device.adapter.channel->fd, .events = POLLIN, .revents = 0});
    ibv_req_notify_cq(device.adapter.cq.get(), /*solicited_only=*/0);
  }
  while (true) {
    ::poll(fds.data(), fds.size(), -1);
    if (fds[0].revents != 0) return;
    if (fds[1].revents != 0) {
      absl::StatusOr<CmEvent> event = channel_->Next(absl::InfinitePast());
      if (event.ok()) OnCmEvent(*event);
    }
    for (size_t i = 0; i < devices_.size(); ++i) {
      if (fds[i + 2].revents == 0) continue;
      ibv_cq* cq = nullptr;
      void* context = nullptr;
      if (ibv_get_cq_event(devices_[i].adapter.channel.get(), &cq, &context) != 0) continue;
      ibv_ack_cq_events(cq, 1);
      // Armed before it is drained: what comes meanwhile gives another event.
      ibv_req_notify_cq(cq, /*solicited_only=*/0);
      if (absl::Status s = Drain(&devices_[i]); !s.ok()) Fail(s);
    }
  }
}

void RdmaTargetLink::OnCmEvent(const CmEvent& event) {
  switch (event.type) {
    case RDMA_CM_EVENT_CONNECT_REQUEST: {
      // Somebody else's connection is refused and forgotten; one of ours that fails is missed by
      // its source, and by AwaitSource.
      (void)TakeConnection(event, CmId(event.id));
      return;
    }
    case RDMA_CM_EVENT_ESTABLISHED:
      return OnEstablished(event.id);
    case RDMA_CM_EVENT_DISCONNECTED:
      return Fail(absl::UnavailableError("rdma link: the source closed it or is gone"));
    case RDMA_CM_EVENT_DEVICE_REMOVAL:
      return Fail(absl::UnavailableError("rdma link: a device of this host was removed"));
    default:
      return;
  }
}

absl::Status RdmaTargetLink::Drain(Device* device) {
  ibv_wc completions[kPollBatch];
  int count = kPollBatch;
  while (count == kPollBatch && !over_) {
    count = ibv_poll_cq(device->adapter.cq.get(), kPollBatch, completions);
    if (count < 0) return absl::UnavailableError("rdma link: its completions can't be read");
    for (int i = 0; i < count; ++i) {
      if (absl::Status s = OnCompletion(completions[i]); !s.ok()) return s;
    }
    // One answer for all messages of a queue pair that came together.
    for (const auto& queue : queues_) {
      if (queue->answered == queue->handled) continue;
      if (absl::Status s = Answer(queue.get()); !s.ok()) return s;
    }
  }
  return absl::OkStatus();
}

absl::Status RdmaTargetLink::OnCompletion(const ibv_wc& completion) {
  Queue* const queue = queues_[QueueOf(completion.wr_id)].get();
  if (completion.status != IBV_WC_SUCCESS) {
    return absl::UnavailableError(absl::StrCat("rdma link: queue pair ", queue->peer_index, ": ",
                                               ibv_wc_status_str(completion.status)));
  }
  return KindOf(completion.wr_id) == RequestKind::kReceive ? OnMessage(queue, completion)
                                                           : absl::OkStatus();
}

// A message is received after all writes before it on its queue pair are in memory: answering a
// commit needs nothing more.
absl::Status RdmaTargetLink::OnMessage(Queue* queue, const ibv_wc& completion) {
  const RdmaAdapter& adapter = devices_[queue->device].adapter;
  const size_t buffer = BufferOf(completion.wr_id);
  absl::StatusOr<RdmaMessage> message =
      DecodeMessage(absl::MakeConstSpan(adapter.buffers.at(buffer), completion.byte_len));
  if (!message.ok()) return message.status();
  if (message->number != queue->handled + 1) {
    return absl::InvalidArgumentError("rdma link: a message out of turn");
  }
  if (message->type == MessageType::kAnswer ||
      (message->type == MessageType::kCommit && message->commit <= queue->commit)) {
    return absl::InvalidArgumentError("rdma link: a source that answers or repeats a commit");
  }
  for (uint32_t i = 0; i < message->runs; ++i) {
    if (!memory_->IsWithinOneRegion(message->run[i])) {
      return absl::InvalidArgumentError("rdma link: a zero run outside the guest");
    }
    if (over_) return absl::CancelledError("rdma link: it is over");
    ZeroRun(*memory_, message->run[i]);
  }
  if (message->commit > 0) queue->commit = message->commit;
  queue->handled = message->number;
  if (!PostReceive(queue->id->qp, adapter, buffer, completion.wr_id)) {
    return absl::UnavailableError("rdma link: a receive could not be posted");
  }
  return absl::OkStatus();
}

absl::Status RdmaTargetLink::Answer(Queue* queue) {
  const RdmaAdapter& adapter = devices_[queue->device].adapter;
  const size_t buffer = queue->first_buffer + kMessageWindow + queue->answers++ % kAnswerBuffers;
  const RdmaMessage answer = {.type = MessageType::kAnswer, .number = queue->handled};
  const size_t bytes = EncodeMessage(answer, adapter.buffers.at(buffer));
  queue->answered = queue->handled;
  if (!PostMessage(queue->id->qp, adapter, buffer, bytes, queue->inline_bytes,
                   MessageId(queue->index))) {
    return absl::UnavailableError("rdma link: an answer could not be sent");
  }
  return absl::OkStatus();
}

}  // namespace presync
