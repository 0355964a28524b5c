// Bringing up the target's end, and taking it down.
#include <sys/eventfd.h>
#include <unistd.h>

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "transport/rdma/rdma_target_link.h"
#include "transport/rdma/work_request_id.h"

namespace presync {
namespace {

// Says nothing of how much of a guess was right.
bool SameToken(const SessionToken& a, const SessionToken& b) {
  uint8_t differ = 0;
  for (size_t i = 0; i < a.size(); ++i) differ |= a[i] ^ b[i];
  return differ == 0;
}

}  // namespace

RdmaTargetLink::RdmaTargetLink(const GuestMemory* memory, const RdmaListen& listen)
    : memory_(memory), stop_(::eventfd(0, EFD_CLOEXEC)) {
  offer_.token = listen.token;
  offer_.queue_pairs = std::clamp<uint32_t>(listen.queue_pairs, 1, kMaxRdmaQueuePairs);
}

absl::StatusOr<std::unique_ptr<RdmaTargetLink>> RdmaTargetLink::Listen(const GuestMemory* memory,
                                                                       const RdmaListen& listen) {
  if (listen.addresses.empty() || listen.addresses.size() > kMaxRdmaDevices) {
    return absl::InvalidArgumentError(
        absl::StrCat("rdma link: 1 to ", kMaxRdmaDevices, " addresses to listen at, one a device"));
  }
  std::unique_ptr<RdmaTargetLink> link(new RdmaTargetLink(memory, listen));
  absl::StatusOr<std::unique_ptr<CmChannel>> channel = CmChannel::Open();
  if (!channel.ok()) return channel.status();
  link->channel_ = *std::move(channel);
  for (const std::string& address : listen.addresses) {
    if (absl::Status s = link->ListenOn(address, listen); !s.ok()) return s;
  }
  MutexLock lock(&link->close_mu_);
  link->thread_ = std::thread(&RdmaTargetLink::Run, link.get());
  return link;
}

absl::Status RdmaTargetLink::ListenOn(const std::string& address, const RdmaListen& listen) {
  absl::StatusOr<CmId> id = channel_->MakeId();
  if (!id.ok()) return id.status();
  if (absl::Status s = ListenAt(*id, address); !s.ok()) return s;
  absl::StatusOr<RdmaAdapter> adapter = MakeAdapter(*id);
  if (!adapter.ok()) return adapter.status();
  uint64_t guest_bytes = 0;
  for (const Region& region : memory_->regions()) guest_bytes += region.size_bytes();
  const uint64_t all_bytes = guest_bytes * listen.addresses.size();
  uint64_t done_bytes = guest_bytes * devices_.size();
  const auto progress = [&](uint64_t bytes) {
    done_bytes += bytes;
    return listen.progress == nullptr || listen.progress(done_bytes, all_bytes);
  };
  absl::StatusOr<std::vector<RegisteredChunk>> chunks =
      RegisterMemory(adapter->pd.get(), *memory_, MemoryRights::kRemoteWrite,
                     /*on_demand_paging=*/false, all_bytes, progress);
  if (!chunks.ok()) return chunks.status();
  adapter->memory = *std::move(chunks);
  const uint32_t each = 2 * kMessageWindow + kAnswerBuffers;
  if (absl::Status s = AddQueues(&*adapter, offer_.queue_pairs * each,
                                 size_t{offer_.queue_pairs} * (kMessageWindow + kAnswerBuffers));
      !s.ok()) {
    return s;
  }
  RdmaEndpoint endpoint = {
      .address = address, .port = ntohs(rdma_get_src_port(id->get())), .device = adapter->name};
  devices_.push_back({.adapter = *std::move(adapter), .listener = *std::move(id)});
  DescribeWindows(devices_.back(), &endpoint);
  offer_.endpoints.push_back(std::move(endpoint));
  return absl::OkStatus();
}

void RdmaTargetLink::DescribeWindows(const Device& device, RdmaEndpoint* endpoint) const {
  for (const RegisteredChunk& chunk : device.adapter.memory) {
    const std::byte* at = memory_->regions()[chunk.region].data() + chunk.offset_bytes;
    endpoint->windows.push_back({.region = static_cast<uint32_t>(chunk.region),
                                 .offset_bytes = chunk.offset_bytes,
                                 .size_bytes = chunk.size_bytes,
                                 .address = reinterpret_cast<uint64_t>(at),
                                 .key = chunk.mr->rkey});
  }
}

// A connection that asks to be taken: a queue pair of ours only with the token, once an index, and
// no more than were agreed on.
absl::Status RdmaTargetLink::TakeConnection(const CmEvent& event, CmId id) {
  const auto refuse = [&](const char* why) {
    rdma_reject(id.get(), nullptr, 0);
    return absl::PermissionDeniedError(absl::StrCat("rdma link: refused a queue pair: ", why));
  };
  const absl::StatusOr<ConnectData> data =
      DecodeConnectData(absl::MakeConstSpan(event.data).first(event.data_bytes));
  if (!data.ok() || !SameToken(data->token, offer_.token)) return refuse("not the token");
  const auto device = std::find_if(devices_.begin(), devices_.end(), [&](const Device& each) {
    return each.listener.get() == event.listener;
  });
  if (device == devices_.end() || id->verbs != device->adapter.pd->context) {
    return refuse("on another device");
  }
  const uint64_t most = uint64_t{offer_.queue_pairs} * devices_.size();
  const bool known = std::any_of(queues_.begin(), queues_.end(), [&](const auto& queue) {
    return queue->peer_index == data->index;
  });
  if (known || data->index >= data->total || data->total > most ||
      (expected_queues_ != 0 && data->total != expected_queues_) ||
      device->queues >= offer_.queue_pairs) {
    return refuse("not the index or number that was agreed on");
  }
  auto queue = std::make_unique<Queue>();
  queue->index = static_cast<uint32_t>(queues_.size());
  queue->peer_index = data->index;
  queue->device = static_cast<size_t>(device - devices_.begin());
  queue->first_buffer = size_t{device->queues} * (kMessageWindow + kAnswerBuffers);
  queue->id = std::move(id);
  absl::StatusOr<uint32_t> inline_bytes =
      MakeQueuePair(queue->id, device->adapter, kAnswerBuffers, kMessageWindow);
  if (!inline_bytes.ok()) return inline_bytes.status();
  queue->inline_bytes = *inline_bytes;
  for (uint32_t i = 0; i < kMessageWindow; ++i) {
    const auto buffer = static_cast<uint32_t>(queue->first_buffer + i);
    if (!PostReceive(queue->id->qp, device->adapter, buffer, ReceiveId(queue->index, buffer))) {
      return absl::UnavailableError("rdma link: a receive could not be posted");
    }
  }
  expected_queues_ = data->total;
  ++device->queues;
  queues_.push_back(std::move(queue));
  return AcceptId(queues_.back()->id);
}

void RdmaTargetLink::OnEstablished(rdma_cm_id* id) {
  bool all = !queues_.empty() && queues_.size() == expected_queues_;
  for (const auto& queue : queues_) {
    if (queue->id.get() == id) queue->established = true;
    all = all && queue->established;
  }
  if (!all) return;
  MutexLock lock(&mu_);
  connected_ = true;
  connected_cv_.SignalAll();
}

absl::Status RdmaTargetLink::AwaitSource(absl::Time deadline) {
  MutexLock lock(&mu_);
  while (!connected_ && status_.ok()) {
    if (connected_cv_.WaitWithDeadline(&mu_, deadline)) break;
  }
  if (!status_.ok()) return status_;
  if (connected_) return absl::OkStatus();
  return absl::DeadlineExceededError("rdma link: the source did not connect its queue pairs");
}

absl::Status RdmaTargetLink::health() const {
  MutexLock lock(&mu_);
  return status_;
}

void RdmaTargetLink::Fail(const absl::Status& why) {
  MutexLock lock(&mu_);
  if (!status_.ok()) return;
  status_ = why;
  over_ = true;
  connected_cv_.SignalAll();
}

// Queue pairs first: without them no device can write, whatever is still registered.
void RdmaTargetLink::Close() {
  MutexLock lock(&close_mu_);
  Fail(absl::CancelledError("rdma link: closed by this host"));
  over_ = true;
  if (!thread_.joinable()) return;
  const uint64_t one = 1;
  (void)!::write(stop_.get(), &one, sizeof(one));
  thread_.join();
  bool open = false;
  for (const auto& queue : queues_) open |= queue->id.Destroy() != 0;
  queues_.clear();
  bool registered = false;
  for (Device& device : devices_) {
    device.listener.Destroy();
    for (RegisteredChunk& chunk : device.adapter.memory) {
      registered |= NoteDestroy("registration", ibv_dereg_mr(chunk.mr.release())) != 0;
    }
  }
  devices_.clear();
  channel_.reset();
  if (!open || !registered) return;
  MutexLock status_lock(&mu_);
  status_ = absl::InternalError(
      "rdma link: a device holds on to the guest's memory; the guest must not run here");
}

RdmaTargetLink::~RdmaTargetLink() { Close(); }

absl::StatusOr<std::unique_ptr<RdmaTarget>> ListenRdma(const GuestMemory* memory,
                                                       const RdmaListen& listen) {
  absl::StatusOr<std::unique_ptr<RdmaTargetLink>> link = RdmaTargetLink::Listen(memory, listen);
  if (!link.ok()) return link.status();
  return *std::move(link);
}

}  // namespace presync
