// The data path of the source: what is done for each write. No allocation, no lock, no clock call
// but one a Post.
#include "transport/rdma/rdma_source_link.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "transport/clock.h"
#include "transport/rdma/rdma_devices.h"
#include "transport/rdma/work_request_id.h"

namespace presync {
namespace {

// Latencies of writes that found no more than this of ours under way are the network's.
constexpr uint64_t kIdleBytes = 64 << 10;
// A zero run's share of the queue: its place in a message.
constexpr uint64_t kZeroCharge = 8;
// However many writes share a signal, this much data at most does: or a slow device would seem to
// stand still.
constexpr uint64_t kBytesPerSignal = 1 << 20;
constexpr absl::Duration kMarksEvery = absl::Milliseconds(50);

uint64_t Charge(const PageWrite& write) {
  return write.zero ? kZeroCharge : PagesToBytes(write.run.count);
}

}  // namespace

bool RdmaSourceLink::Alive() {
  if (broken_.load(std::memory_order_acquire) && status_.ok()) {
    MutexLock lock(&mu_);
    status_ = broken_status_;
  }
  return status_.ok();
}

void RdmaSourceLink::Fail(absl::Status why) {
  if (status_.ok()) status_ = std::move(why);
}

RdmaSourceLink::Place RdmaSourceLink::PlaceOf(PageIndex page) const {
  const size_t region = memory_->RegionOf(page);
  const PageCount offset = page - memory_->FirstPage(region);
  return {.shard = first_shards_[region] + offset / kRdmaShardPages,
          .region = region,
          .offset_bytes = PagesToBytes(offset % kRdmaShardPages)};
}

PageRun RdmaSourceLink::TakePiece(PageRun* run, bool zero) const {
  const size_t region = memory_->RegionOf(run->first);
  const PageCount in_shard = (run->first - memory_->FirstPage(region)) % kRdmaShardPages;
  PageCount count = std::min(run->count, kRdmaShardPages - in_shard);
  if (!zero) count = std::min(count, max_write_pages_);
  const PageRun piece = {run->first, count};
  run->first += count;
  run->count -= count;
  return piece;
}

// A write that is larger than the queue is taken when nothing else is under way. Beyond its first
// piece a write may wait for room: see GoOnWithPartial.
bool RdmaSourceLink::HasRoom(const PageWrite& write) const {
  if (partial_.count > 0 || free_writes_.empty()) return false;
  if (outstanding_writes_ > 0 && stats_.queued_bytes + Charge(write) > options_.queue_bytes) {
    return false;
  }
  const Queue& queue = queues_[PlaceOf(write.run.first).shard % queues_.size()];
  if (write.zero) return queue.open.runs < kMaxMessageRuns || MessageRoom(queue);
  return queue.requests < depth_ && queue.piece_tail - queue.piece_head < queue.pieces.size();
}

void RdmaSourceLink::Accept(const PageWrite& write) {
  const uint32_t index = free_writes_.back();
  free_writes_.pop_back();
  const uint32_t epoch = static_cast<uint32_t>((newest_ + 1) % kEpochs);
  writes_[index] = {write, write.run.count, epoch, Charge(write)};
  ++outstanding_[epoch];
  ++outstanding_writes_;
  stats_.queued_bytes += Charge(write);
  partial_ = write.run;
  partial_write_ = index;
  GoOnWithPartial();
}

void RdmaSourceLink::GoOnWithPartial() {
  const bool zero = partial_.count > 0 && writes_[partial_write_].write.zero;
  while (partial_.count > 0) {
    PageRun rest = partial_;
    const PageRun piece = TakePiece(&rest, zero);
    if (!PostPiece(piece, partial_write_)) return;
    partial_ = rest;
  }
}

// False: no room for it now.
bool RdmaSourceLink::PostPiece(PageRun piece, uint32_t write) {
  const size_t shard = PlaceOf(piece.first).shard;
  Queue& queue = queues_[shard % queues_.size()];
  if (writes_[write].write.zero) return PostZero(&queue, piece, write);
  if (queue.requests >= depth_ || queue.piece_tail - queue.piece_head >= queue.pieces.size()) {
    return false;
  }
  Chain(&queue, shard, piece, write);
  return true;
}

bool RdmaSourceLink::PostZero(Queue* queue, PageRun piece, uint32_t write) {
  if (queue->open.runs == kMaxMessageRuns) {
    if (!MessageRoom(*queue)) return false;
    SendOpen(queue);
  }
  queue->open_sent.write[queue->open.runs] = write;
  queue->open_sent.pages[queue->open.runs] = piece.count;
  queue->open.run[queue->open.runs++] = piece;
  return true;
}

// Adds the piece to the queue's chain, to its last request where it goes on from there.
void RdmaSourceLink::Chain(Queue* queue, size_t shard, PageRun piece, uint32_t write) {
  const uint64_t bytes = PagesToBytes(piece.count);
  const size_t mask = queue->pieces.size() - 1;
  const bool joins =
      queue->chained > 0 && queue->chain_shard == shard && queue->chain_end == piece.first &&
      queue->parts[queue->chained - 1].length + bytes <= PagesToBytes(max_write_pages_);
  if (joins) {
    queue->pieces[(queue->piece_tail - 1) & mask].ends_request = false;
    queue->parts[queue->chained - 1].length += static_cast<uint32_t>(bytes);
  } else {
    const Place place = PlaceOf(piece.first);
    const ShardKeys& keys = devices_[queue->device].shards[shard];
    ibv_sge& part = queue->parts[queue->chained];
    part.addr = reinterpret_cast<uint64_t>(memory_->regions()[place.region].data()) +
                PagesToBytes(piece.first - memory_->FirstPage(place.region));
    part.length = static_cast<uint32_t>(bytes);
    part.lkey = keys.local_key;
    ibv_send_wr& request = queue->chain[queue->chained];
    request.wr.rdma.remote_addr = keys.remote_address + place.offset_bytes;
    request.wr.rdma.rkey = keys.remote_key;
    ++queue->chained;
    ++queue->requests;
    queue->chain_shard = shard;
  }
  queue->chain_end = piece.end();
  queue->pieces[queue->piece_tail & mask] = {
      .write = write,
      .pages = piece.count,
      .ends_request = true,
      .found_idle = stats_.queued_bytes <= kIdleBytes,
  };
  ++queue->piece_tail;
  queue->chain[queue->chained - 1].wr_id = WriteId(queue->index, queue->piece_tail);
  stats_.wire_bytes += bytes;
}

// Everything that was collected goes to the devices: a doorbell a queue pair, then its messages.
void RdmaSourceLink::RingDoorbells() {
  for (Queue& queue : queues_) {
    if (queue.chained > 0) RingDoorbell(&queue);
    if (queue.open.runs > 0 && MessageRoom(queue)) SendOpen(&queue);
  }
}

void RdmaSourceLink::RingDoorbell(Queue* queue) {
  if (!Alive()) return;
  const int64_t now_ns = absl::ToUnixNanos(MonotonicNow());
  const uint32_t count = queue->chained;
  for (uint32_t i = 0; i < count; ++i) {
    queue->bytes_since_signal += queue->parts[i].length;
    const bool last = i + 1 == count;
    const bool signal = last || ++queue->since_signal >= options_.signal_every ||
                        queue->bytes_since_signal >= kBytesPerSignal;
    queue->chain[i].send_flags = signal ? IBV_SEND_SIGNALED : 0;
    queue->chain[i].next = last ? nullptr : &queue->chain[i + 1];
    if (!signal) continue;
    // Only the piece that a completion names tells its time.
    queue->since_signal = 0;
    queue->bytes_since_signal = 0;
    const uint32_t piece = PieceOf(queue->chain[i].wr_id) - 1;
    queue->pieces[piece & (queue->pieces.size() - 1)].posted_ns = now_ns;
  }
  queue->chained = 0;
  ibv_send_wr* bad = nullptr;
  if (const int error = ibv_post_send(queue->id->qp, queue->chain.data(), &bad); error != 0) {
    Fail(absl::UnavailableError(absl::StrCat("rdma link: ", devices_[queue->device].adapter.name,
                                             " takes no more writes (errno ", error, ")")));
  }
}

void RdmaSourceLink::SendOpen(Queue* queue) {
  queue->open.type = MessageType::kZero;
  queue->open_sent.runs = queue->open.runs;
  SendMessage(queue, &queue->open, queue->open_sent);
  queue->open.runs = 0;
}

// Precondition: MessageRoom.
void RdmaSourceLink::SendMessage(Queue* queue, RdmaMessage* message, const Sent& sent) {
  if (!Alive()) return;
  const size_t slot = queue->messages_sent % kMessageWindow;
  queue->sent[slot] = sent;
  message->number = ++queue->messages_sent;
  const RdmaAdapter& adapter = devices_[queue->device].adapter;
  const size_t bytes = EncodeMessage(*message, adapter.buffers.at(queue->first_buffer + slot));
  stats_.wire_bytes += bytes;
  if (!PostMessage(queue->id->qp, adapter, queue->first_buffer + slot, bytes, queue->inline_bytes,
                   MessageId(queue->index))) {
    Fail(absl::UnavailableError(
        absl::StrCat("rdma link: ", adapter.name, " takes no more messages")));
  }
}

// A commit goes out on every queue pair when all writes before it have completed on all of them.
void RdmaSourceLink::SendCommits() {
  while (ready_ < newest_ && outstanding_[(ready_ + 1) % kEpochs] == 0) ++ready_;
  for (Queue& queue : queues_) {
    if (queue.commit_sent >= ready_ || !MessageRoom(queue)) continue;
    RdmaMessage message = {.type = MessageType::kCommit, .commit = ready_};
    Sent sent;
    sent.commit = ready_;
    SendMessage(&queue, &message, sent);
    queue.commit_sent = ready_;
  }
}

absl::StatusOr<size_t> RdmaSourceLink::Post(absl::Span<const PageWrite> writes) {
  if (!Alive()) return status_;
  if (!Outstanding()) last_progress_ns_ = absl::ToUnixNanos(MonotonicNow());
  GoOnWithPartial();
  size_t taken = 0;
  for (; taken < writes.size(); ++taken) {
    const PageRun run = writes[taken].run;
    if (!memory_->IsWithinOneRegion(run)) {
      if (taken > 0) break;
      return absl::InvalidArgumentError(absl::StrCat(
          "rdma link: run of ", run.count, " pages from ", run.first, " is not within one region"));
    }
    if (!HasRoom(writes[taken])) break;
    Accept(writes[taken]);
  }
  RingDoorbells();
  if (!status_.ok()) return status_;
  return taken;
}

absl::StatusOr<CommitId> RdmaSourceLink::PostCommit() {
  if (!Alive()) return status_;
  if (newest_ - news_.committed >= kMaxCommits) {
    return absl::ResourceExhaustedError(
        absl::StrCat("rdma link: ", kMaxCommits, " commits are under way"));
  }
  if (!Outstanding()) last_progress_ns_ = absl::ToUnixNanos(MonotonicNow());
  ++newest_;
  SendCommits();
  if (!status_.ok()) return status_;
  return newest_;
}

LinkStats RdmaSourceLink::stats() const {
  LinkStats stats = stats_;
  stats.completion_latency = latencies_.Median();
  stats.network_latency = idle_latencies_.Median();
  const absl::Time now = MonotonicNow();
  if (now >= next_marks_) {
    next_marks_ = now + kMarksEvery;
    marks_ = 0;
    for (const Device& device : devices_) {
      marks_ += ReadCongestionMarks(device.adapter.name, device.adapter.port);
    }
  }
  stats.congestion_marks = marks_;
  return stats;
}

std::vector<std::string> RdmaSourceLink::devices() const {
  std::vector<std::string> names;
  for (const Device& device : devices_) names.push_back(device.adapter.name);
  return names;
}

absl::Duration RdmaSourceLink::Latencies::Median() const {
  const size_t count = std::min<uint64_t>(measured_, recent_.size());
  if (count == 0) return absl::ZeroDuration();
  std::array<int64_t, 127> sorted = recent_;
  std::nth_element(sorted.begin(), sorted.begin() + count / 2, sorted.begin() + count);
  return absl::Nanoseconds(sorted[count / 2]);
}

}  // namespace presync
