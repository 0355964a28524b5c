// What the source's devices report, and waiting for it.
#include <poll.h>
#include <unistd.h>

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "transport/clock.h"
#include "transport/rdma/rdma_source_link.h"
#include "transport/rdma/work_request_id.h"

namespace presync {
namespace {

constexpr int kPollBatch = 32;

absl::Status CompletionError(const std::string& device, const ibv_wc& completion) {
  return absl::UnavailableError(absl::StrCat(
      "rdma link: ", device, ", queue pair ", QueueOf(completion.wr_id), ": ",
      ibv_wc_status_str(completion.status),
      completion.status == IBV_WC_RETRY_EXC_ERR ? " (nothing answers: the path or the peer is gone)"
                                                : ""));
}

}  // namespace

bool RdmaSourceLink::Outstanding() const {
  return outstanding_writes_ > 0 || news_.committed < newest_;
}

void RdmaSourceLink::Retire(uint32_t index, PageCount pages) {
  Write& write = writes_[index];
  (write.write.zero ? stats_.zero_bytes : stats_.payload_bytes) += PagesToBytes(pages);
  write.pages_left -= pages;
  if (write.pages_left > 0) return;
  stats_.queued_bytes -= write.charged_bytes;
  --outstanding_[write.epoch];
  --outstanding_writes_;
  news_.completed.push_back(write.write);
  free_writes_.push_back(index);
}

// A queue pair's writes complete in order: a completion tells of all before it.
void RdmaSourceLink::RetirePieces(Queue* queue, uint32_t until, int64_t now_ns) {
  const size_t mask = queue->pieces.size() - 1;
  if (until - queue->piece_head > queue->piece_tail - queue->piece_head) {
    return Fail(absl::UnavailableError("rdma link: the device reported what was not posted"));
  }
  const Piece& newest = queue->pieces[(until - 1) & mask];
  latencies_.Add(now_ns - newest.posted_ns);
  if (newest.found_idle) idle_latencies_.Add(now_ns - newest.posted_ns);
  while (queue->piece_head != until) {
    const Piece& piece = queue->pieces[queue->piece_head & mask];
    ++queue->piece_head;
    queue->requests -= piece.ends_request ? 1 : 0;
    Retire(piece.write, piece.pages);
  }
}

void RdmaSourceLink::OnAnswer(Queue* queue, const ibv_wc& completion) {
  const RdmaAdapter& adapter = devices_[queue->device].adapter;
  const size_t buffer = BufferOf(completion.wr_id);
  const absl::StatusOr<RdmaMessage> answer =
      DecodeMessage(absl::MakeConstSpan(adapter.buffers.at(buffer), completion.byte_len));
  if (!answer.ok() || answer->type != MessageType::kAnswer ||
      answer->number > queue->messages_sent || answer->number <= queue->messages_answered) {
    return Fail(absl::UnavailableError("rdma link: the target answered what was not asked"));
  }
  if (!PostReceive(queue->id->qp, adapter, buffer, completion.wr_id)) {
    return Fail(absl::UnavailableError("rdma link: no more answers can be received"));
  }
  while (queue->messages_answered < answer->number) {
    const Sent& sent = queue->sent[queue->messages_answered % kMessageWindow];
    ++queue->messages_answered;
    for (uint32_t i = 0; i < sent.runs; ++i) Retire(sent.write[i], sent.pages[i]);
    if (sent.commit > 0) queue->commit_answered = sent.commit;
  }
}

void RdmaSourceLink::OnCompletion(const ibv_wc& completion, int64_t now_ns) {
  Queue* const queue = &queues_[QueueOf(completion.wr_id)];
  if (completion.status != IBV_WC_SUCCESS) {
    return Fail(CompletionError(devices_[queue->device].adapter.name, completion));
  }
  switch (KindOf(completion.wr_id)) {
    case RequestKind::kWrite:
      return RetirePieces(queue, PieceOf(completion.wr_id), now_ns);
    case RequestKind::kReceive:
      return OnAnswer(queue, completion);
    case RequestKind::kMessage:
      return;
  }
}

void RdmaSourceLink::Drain(Device* device) {
  ibv_wc completions[kPollBatch];
  int count = kPollBatch;
  while (count == kPollBatch && status_.ok()) {
    count = ibv_poll_cq(device->adapter.cq.get(), kPollBatch, completions);
    if (count < 0) return Fail(absl::UnavailableError("rdma link: its completions can't be read"));
    if (count == 0) return;
    const int64_t now_ns = absl::ToUnixNanos(MonotonicNow());
    last_progress_ns_ = now_ns;
    for (int i = 0; i < count && status_.ok(); ++i) OnCompletion(completions[i], now_ns);
  }
}

// Takes what is there, and sends what waited for it.
void RdmaSourceLink::Progress() {
  for (Device& device : devices_) Drain(&device);
  if (!status_.ok()) return;
  GoOnWithPartial();
  RingDoorbells();
  SendCommits();
  CommitId committed = newest_;
  for (const Queue& queue : queues_) committed = std::min(committed, queue.commit_answered);
  news_.committed = committed;
}

// iWARP's writes complete into TCP's buffers and die there silently; and where a device retries for
// longer than a sync may stand still, this ends it.
void RdmaSourceLink::CheckStall(int64_t now_ns) {
  if (!status_.ok() || !Outstanding()) return;
  const absl::Duration still = absl::Nanoseconds(now_ns - last_progress_ns_);
  if (still < options_.stall_timeout) return;
  Fail(absl::UnavailableError(absl::StrCat("rdma link: nothing was answered for ",
                                           absl::ToInt64Milliseconds(still),
                                           " ms: the path or the peer is gone")));
}

absl::Status RdmaSourceLink::Poll(LinkEvents* events) {
  if (!Alive()) return status_;
  Progress();
  if (news_.completed.empty()) CheckStall(absl::ToUnixNanos(MonotonicNow()));
  if (!status_.ok()) return status_;
  events->completed.insert(events->completed.end(), news_.completed.begin(), news_.completed.end());
  events->committed = news_.committed;
  told_ = news_.committed;
  news_.Clear();
  return absl::OkStatus();
}

absl::Status RdmaSourceLink::Wait(absl::Time deadline) {
  while (Alive()) {
    Progress();
    CheckStall(absl::ToUnixNanos(MonotonicNow()));
    if (!status_.ok() || HasNews() || MonotonicNow() >= deadline) break;
    bool armed_now = false;
    for (Device& device : devices_) {
      if (device.armed) continue;
      if (ibv_req_notify_cq(device.adapter.cq.get(), /*solicited_only=*/0) != 0) {
        Fail(absl::UnavailableError("rdma link: its completions can't be waited for"));
        return absl::OkStatus();
      }
      device.armed = armed_now = true;
    }
    // What came between the last look and the arming gives no event.
    if (!armed_now) Sleep(deadline);
  }
  return absl::OkStatus();
}

// Until a device has an event, the link breaks, it is time to look for a stall, or `deadline`.
void RdmaSourceLink::Sleep(absl::Time deadline) {
  std::array<pollfd, kMaxRdmaDevices + 1> fds;
  size_t count = 0;
  for (const Device& device : devices_) {
    fds[count++] = {.fd = device.adapter.channel->fd, .events = POLLIN, .revents = 0};
  }
  fds[count++] = {.fd = wake_.get(), .events = POLLIN, .revents = 0};
  absl::Duration longest = deadline - MonotonicNow();
  if (Outstanding()) longest = std::min(longest, options_.stall_timeout / 4);
  longest = std::clamp(longest, absl::ZeroDuration(), absl::Hours(1));
  const timespec timeout = absl::ToTimespec(longest);
  ::ppoll(fds.data(), count, &timeout, nullptr);
  for (size_t i = 0; i < devices_.size(); ++i) {
    if ((fds[i].revents & POLLIN) == 0) continue;
    ibv_cq* cq = nullptr;
    void* context = nullptr;
    if (ibv_get_cq_event(devices_[i].adapter.channel.get(), &cq, &context) == 0) {
      ibv_ack_cq_events(cq, 1);
      devices_[i].armed = false;
    }
  }
}

// The watching thread: the connection manager says when the peer or a device is gone.
void RdmaSourceLink::Watch() {
  while (true) {
    pollfd fds[] = {{.fd = channel_->fd(), .events = POLLIN, .revents = 0},
                    {.fd = stop_.get(), .events = POLLIN, .revents = 0}};
    ::poll(fds, 2, -1);
    if (fds[1].revents != 0) return;
    const absl::StatusOr<CmEvent> event = channel_->Next(absl::InfinitePast());
    if (!event.ok() || event->type == RDMA_CM_EVENT_TIMEWAIT_EXIT) continue;
    MutexLock lock(&mu_);
    if (!broken_status_.ok()) continue;
    broken_status_ = absl::UnavailableError(absl::StrCat("rdma link: ",
                                                         event->type == RDMA_CM_EVENT_DEVICE_REMOVAL
                                                             ? "a device of this host was removed"
                                                             : "the target closed it or is gone",
                                                         " (", rdma_event_str(event->type), ")"));
    broken_.store(true, std::memory_order_release);
    const uint64_t one = 1;
    (void)!::write(wake_.get(), &one, sizeof(one));
  }
}

}  // namespace presync
