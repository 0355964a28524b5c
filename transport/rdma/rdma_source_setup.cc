// Bringing up the source's end.
#include <sys/eventfd.h>
#include <unistd.h>

#include <algorithm>
#include <bit>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "transport/clock.h"
#include "transport/rdma/rdma_devices.h"
#include "transport/rdma/rdma_source_link.h"
#include "transport/rdma/work_request_id.h"

namespace presync {
namespace {

constexpr uint64_t kShardBytes = kRdmaShardPages * kPageBytes;
// Room for messages beside the writes: those that wait for their answers, and as many whose
// completions were not taken yet.
constexpr uint32_t kMessageSends = 2 * kMessageWindow;
// Joined writes have several pieces a work request.
constexpr uint32_t kPiecesPerRequest = 4;
// The device's own retries end after so long at most, whatever may pass without an answer: one lost
// answer costs an eighth of it.
constexpr absl::Duration kLongestRetries = absl::Seconds(1);

}  // namespace

// Makes one link step by step; what was made goes with it if a step fails.
class RdmaSourceSetup {
 public:
  RdmaSourceSetup(const GuestMemory* memory, const RdmaOffer& offer,
                  const RdmaSourceOptions& options, absl::Time deadline)
      : memory_(*memory),
        offer_(offer),
        options_(options),
        deadline_(deadline),
        link_(new RdmaSourceLink(memory, options)) {}

  absl::StatusOr<std::unique_ptr<RdmaSourceLink>> Run();

 private:
  absl::Status CheckOptions() const;
  absl::Status ChooseDevices();
  absl::Status Register(size_t index);
  absl::Status MapShards(RdmaSourceLink::Device* device, const RdmaEndpoint& endpoint);
  absl::Status SizeQueues();
  absl::Status ConnectQueue(size_t index, size_t device);

  const GuestMemory& memory_;
  const RdmaOffer& offer_;
  const RdmaSourceOptions& options_;
  const absl::Time deadline_;
  std::unique_ptr<RdmaSourceLink> link_;
  std::vector<const RdmaEndpoint*> endpoints_;  // of each device
  std::vector<CmId> first_ids_;                 // of each device: its first queue pair's
  uint32_t queues_per_device_ = 1;
  uint64_t all_bytes_ = 0;  // to register, over all devices
  uint64_t done_bytes_ = 0;
};

absl::Status RdmaSourceSetup::CheckOptions() const {
  if (offer_.endpoints.empty() || offer_.endpoints.size() > kMaxRdmaDevices ||
      offer_.queue_pairs == 0) {
    return absl::InvalidArgumentError("rdma link: the target's offer names no usable endpoint");
  }
  if (options_.queue_pairs < 1 || options_.queue_pairs > kMaxRdmaQueuePairs || options_.depth < 1 ||
      options_.signal_every < 1) {
    return absl::InvalidArgumentError(
        absl::StrCat("rdma link: 1 to ", kMaxRdmaQueuePairs,
                     " queue pairs a device, and a depth and signal interval of at least 1"));
  }
  if (options_.memory_may_be_discarded && !options_.on_demand_paging) {
    return absl::FailedPreconditionError(
        "rdma link: this guest has a balloon: pages that it gives back and takes again would be "
        "read from where they were. Take virtio-balloon away, or use on-demand paging");
  }
  return absl::OkStatus();
}

// The way to each of the target's addresses decides for a device of ours.
absl::Status RdmaSourceSetup::ChooseDevices() {
  std::vector<std::string> passed_over;
  for (const RdmaEndpoint& endpoint : offer_.endpoints) {
    absl::StatusOr<CmId> id = link_->channel_->MakeId();
    if (!id.ok()) return id.status();
    const absl::Status resolved =
        Resolve(*link_->channel_, *id, endpoint.address, endpoint.port,
                std::min(options_.stall_timeout, kLongestRetries), deadline_);
    if (!resolved.ok()) {
      passed_over.push_back(std::string(resolved.message()));
      continue;
    }
    const std::string name = DeviceName(*id);
    if (!options_.devices.empty() && std::find(options_.devices.begin(), options_.devices.end(),
                                               name) == options_.devices.end()) {
      passed_over.push_back(absl::StrCat("the way to ", endpoint.address, " is by ", name,
                                         ", which --rdma-devices does not name"));
      continue;
    }
    absl::StatusOr<RdmaAdapter> adapter = MakeAdapter(*id);
    if (!adapter.ok()) return adapter.status();
    link_->devices_.push_back({.adapter = *std::move(adapter)});
    endpoints_.push_back(&endpoint);
    first_ids_.push_back(*std::move(id));
  }
  if (!link_->devices_.empty()) return absl::OkStatus();
  return absl::UnimplementedError(absl::StrJoin(passed_over, "; "));
}

absl::Status RdmaSourceSetup::Register(size_t index) {
  RdmaSourceLink::Device& device = link_->devices_[index];
  const auto progress = [&](uint64_t bytes) {
    done_bytes_ += bytes;
    return options_.progress == nullptr || options_.progress(done_bytes_, all_bytes_);
  };
  absl::StatusOr<std::vector<RegisteredChunk>> chunks =
      RegisterMemory(device.adapter.pd.get(), memory_, MemoryRights::kLocalRead,
                     options_.on_demand_paging, all_bytes_, progress);
  if (!chunks.ok()) return chunks.status();
  device.adapter.memory = *std::move(chunks);
  return MapShards(&device, *endpoints_[index]);
}

// The keys of every shard. The target's windows must cover every region, in order, cut at shards.
absl::Status RdmaSourceSetup::MapShards(RdmaSourceLink::Device* device,
                                        const RdmaEndpoint& endpoint) {
  const size_t regions = memory_.regions().size();
  device->shards.resize(link_->first_shards_[regions]);
  for (const RegisteredChunk& chunk : device->adapter.memory) {
    const size_t first = link_->first_shards_[chunk.region] + chunk.offset_bytes / kShardBytes;
    const size_t count = (chunk.size_bytes + kShardBytes - 1) / kShardBytes;
    for (size_t i = 0; i < count; ++i) device->shards[first + i].local_key = chunk.mr->lkey;
  }
  size_t region = 0;
  uint64_t offset = 0;
  for (const RdmaWindow& window : endpoint.windows) {
    const uint64_t region_bytes = region < regions ? memory_.regions()[region].size_bytes() : 0;
    if (window.region != region || window.offset_bytes != offset || window.size_bytes == 0 ||
        window.size_bytes > region_bytes - offset ||
        (window.size_bytes % kShardBytes != 0 && offset + window.size_bytes != region_bytes)) {
      return absl::InvalidArgumentError("rdma link: the target's windows do not fit the guest");
    }
    const size_t first = link_->first_shards_[region] + offset / kShardBytes;
    const size_t count = (window.size_bytes + kShardBytes - 1) / kShardBytes;
    for (size_t i = 0; i < count; ++i) {
      device->shards[first + i].remote_address = window.address + i * kShardBytes;
      device->shards[first + i].remote_key = window.key;
    }
    offset += window.size_bytes;
    if (offset == region_bytes) {
      ++region;
      offset = 0;
    }
  }
  if (region == regions && offset == 0) return absl::OkStatus();
  return absl::InvalidArgumentError("rdma link: the target's windows do not cover the guest");
}

absl::Status RdmaSourceSetup::SizeQueues() {
  queues_per_device_ = std::min(options_.queue_pairs, offer_.queue_pairs);
  link_->depth_ = options_.depth;
  for (const RdmaSourceLink::Device& device : link_->devices_) {
    link_->depth_ = std::min(link_->depth_, MaxSends(device.adapter) - kMessageSends);
  }
  link_->max_write_pages_ = static_cast<PageCount>(
      std::clamp<uint64_t>(options_.max_write_bytes / kPageBytes, 1, kRdmaShardPages));
  for (RdmaSourceLink::Device& device : link_->devices_) {
    const uint32_t each = link_->depth_ + kMessageSends + kMessageWindow;
    if (absl::Status s = AddQueues(&device.adapter, queues_per_device_ * each,
                                   size_t{queues_per_device_} * 2 * kMessageWindow);
        !s.ok()) {
      return s;
    }
  }
  // Every write has a piece or waits in a message, but for one that is posted in part.
  const uint32_t pieces = std::bit_ceil(link_->depth_ * kPiecesPerRequest);
  const size_t queues = queues_per_device_ * link_->devices_.size();
  const size_t writes = queues * (pieces + (kMessageWindow + 1) * kMaxMessageRuns) + 1;
  link_->writes_.resize(writes);
  for (size_t i = writes; i > 0; --i) {
    link_->free_writes_.push_back(static_cast<uint32_t>(i - 1));
  }
  link_->news_.completed.reserve(writes);
  link_->queues_.reserve(queues);
  for (size_t i = 0; i < queues; ++i) {
    RdmaSourceLink::Queue queue;
    queue.device = i % link_->devices_.size();
    queue.index = static_cast<uint32_t>(i);
    queue.first_buffer = i / link_->devices_.size() * 2 * kMessageWindow;
    queue.pieces.resize(pieces);
    queue.chain.resize(link_->depth_);
    queue.parts.resize(link_->depth_);
    for (uint32_t w = 0; w < link_->depth_; ++w) {
      queue.chain[w].sg_list = &queue.parts[w];
      queue.chain[w].num_sge = 1;
      queue.chain[w].opcode = IBV_WR_RDMA_WRITE;
    }
    link_->queues_.push_back(std::move(queue));
  }
  return absl::OkStatus();
}

absl::Status RdmaSourceSetup::ConnectQueue(size_t index, size_t device_index) {
  RdmaSourceLink::Queue& queue = link_->queues_[index];
  const RdmaSourceLink::Device& device = link_->devices_[device_index];
  if (first_ids_[device_index].get() != nullptr) {
    queue.id = std::move(first_ids_[device_index]);
  } else {
    absl::StatusOr<CmId> id = link_->channel_->MakeId();
    if (!id.ok()) return id.status();
    queue.id = *std::move(id);
    const RdmaEndpoint& endpoint = *endpoints_[device_index];
    if (absl::Status s = Resolve(*link_->channel_, queue.id, endpoint.address, endpoint.port,
                                 std::min(options_.stall_timeout, kLongestRetries), deadline_);
        !s.ok()) {
      return s;
    }
    if (queue.id->verbs != device.adapter.pd->context) {
      return absl::UnavailableError(absl::StrCat("rdma link: the way to ", endpoint.address,
                                                 " changed from one device to another"));
    }
  }
  absl::StatusOr<uint32_t> inline_bytes =
      MakeQueuePair(queue.id, device.adapter, link_->depth_ + kMessageSends, kMessageWindow);
  if (!inline_bytes.ok()) return inline_bytes.status();
  queue.inline_bytes = *inline_bytes;
  for (uint32_t i = 0; i < kMessageWindow; ++i) {
    const auto buffer = static_cast<uint32_t>(queue.first_buffer + kMessageWindow + i);
    if (!PostReceive(queue.id->qp, device.adapter, buffer, ReceiveId(queue.index, buffer))) {
      return absl::UnavailableError("rdma link: a receive could not be posted");
    }
  }
  return ConnectId(*link_->channel_, queue.id,
                   {.index = static_cast<uint32_t>(index),
                    .total = static_cast<uint32_t>(link_->queues_.size()),
                    .token = offer_.token},
                   deadline_);
}

absl::StatusOr<std::unique_ptr<RdmaSourceLink>> RdmaSourceSetup::Run() {
  if (absl::Status s = CheckOptions(); !s.ok()) return s;
  absl::StatusOr<std::unique_ptr<CmChannel>> channel = CmChannel::Open();
  if (!channel.ok()) return channel.status();
  link_->channel_ = *std::move(channel);
  if (absl::Status s = ChooseDevices(); !s.ok()) return s;
  link_->first_shards_.push_back(0);
  uint64_t guest_bytes = 0;
  for (const Region& region : memory_.regions()) {
    guest_bytes += region.size_bytes();
    link_->first_shards_.push_back(link_->first_shards_.back() +
                                   (region.pages() + kRdmaShardPages - 1) / kRdmaShardPages);
  }
  all_bytes_ = guest_bytes * link_->devices_.size();
  for (size_t i = 0; i < link_->devices_.size(); ++i) {
    if (absl::Status s = Register(i); !s.ok()) return s;
  }
  if (absl::Status s = SizeQueues(); !s.ok()) return s;
  for (size_t i = 0; i < link_->queues_.size(); ++i) {
    if (options_.progress != nullptr && !options_.progress(done_bytes_, all_bytes_)) {
      return absl::CancelledError("rdma link: it was called off");
    }
    if (absl::Status s = ConnectQueue(i, link_->queues_[i].device); !s.ok()) return s;
  }
  link_->Start();
  return std::move(link_);
}

RdmaSourceLink::RdmaSourceLink(const GuestMemory* memory, const RdmaSourceOptions& options)
    : memory_(memory),
      options_(options),
      wake_(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)),
      stop_(::eventfd(0, EFD_CLOEXEC)) {}

void RdmaSourceLink::Start() {
  last_progress_ns_ = absl::ToUnixNanos(MonotonicNow());
  watcher_ = std::thread(&RdmaSourceLink::Watch, this);
}

RdmaSourceLink::~RdmaSourceLink() {
  const uint64_t one = 1;
  (void)!::write(stop_.get(), &one, sizeof(one));
  if (watcher_.joinable()) watcher_.join();
}

absl::StatusOr<std::unique_ptr<RdmaSourceLink>> RdmaSourceLink::Connect(
    const GuestMemory* memory, const RdmaOffer& offer, const RdmaSourceOptions& options,
    absl::Time deadline) {
  return RdmaSourceSetup(memory, offer, options, deadline).Run();
}

absl::Status CheckRdma(const std::vector<std::string>& devices) {
  return CheckRdmaDevices(devices);
}

absl::StatusOr<RdmaSource> ConnectRdma(const GuestMemory* memory, const RdmaOffer& offer,
                                       const RdmaSourceOptions& options, absl::Time deadline) {
  absl::StatusOr<std::unique_ptr<RdmaSourceLink>> link =
      RdmaSourceLink::Connect(memory, offer, options, deadline);
  if (!link.ok()) return link.status();
  std::vector<std::string> devices = (*link)->devices();
  return RdmaSource{.link = *std::move(link), .devices = std::move(devices)};
}

}  // namespace presync
