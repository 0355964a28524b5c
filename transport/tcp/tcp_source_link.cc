#include "transport/tcp/tcp_source_link.h"

#include <algorithm>
#include <optional>
#include <utility>

#include "absl/strings/str_cat.h"
#include "transport/clock.h"
#include "transport/tcp/sender.h"

namespace presync {
namespace {

// What was heard of the path longer ago says nothing of now.
constexpr absl::Duration kFreshAck = absl::Milliseconds(500);

// What a piece takes of a queue: also a piece without payload takes some.
uint64_t ChargedBytes(const Frame& frame) {
  const bool payload = frame.type == FrameType::kBytes;
  return kFrameHeaderBytes + (payload ? PagesToBytes(frame.run.count) : 0);
}

// Calls `piece(stream index, frame)` for each frame that `write` becomes.
template <typename F>
void ForEachPiece(const PageWrite& write, size_t streams, F piece) {
  PageRun rest = write.run;
  Frame frame;
  frame.type = write.zero ? FrameType::kZero : FrameType::kBytes;
  const PageCount max_pages = write.zero ? kShardPages : FrameSender::kMaxBatchPages;
  while (rest.count > 0) {
    frame.run = TakeFrameRun(&rest, max_pages);
    piece(StreamOf(frame.run.first, streams), frame);
  }
}

}  // namespace

absl::StatusOr<std::unique_ptr<TcpSourceLink>> TcpSourceLink::Create(
    const GuestMemory* memory, std::vector<UniqueFd> sockets, const TcpSourceOptions& options,
    const SocketOptions& socket_options) {
  std::vector<std::unique_ptr<ByteStream>> streams;
  for (UniqueFd& socket : sockets) {
    auto stream = MakeSocketStream(std::move(socket), socket_options);
    if (!stream.ok()) return stream.status();
    streams.push_back(*std::move(stream));
  }
  return Create(memory, std::move(streams), options);
}

absl::StatusOr<std::unique_ptr<TcpSourceLink>> TcpSourceLink::Create(
    const GuestMemory* memory, std::vector<std::unique_ptr<ByteStream>> streams,
    const TcpSourceOptions& options) {
  if (streams.empty() || streams.size() > kMaxFrameStreams) {
    return absl::InvalidArgumentError(
        absl::StrCat("tcp link: ", streams.size(), " streams; 1 to ", kMaxFrameStreams, " work"));
  }
  auto link =
      std::unique_ptr<TcpSourceLink>(new TcpSourceLink(memory, std::move(streams), options));
  link->Start();
  return link;
}

TcpSourceLink::TcpSourceLink(const GuestMemory* memory,
                             std::vector<std::unique_ptr<ByteStream>> streams,
                             const TcpSourceOptions& options)
    : memory_(memory), options_(options) {
  for (auto& bytes : streams) {
    streams_.push_back(std::make_unique<Stream>());
    streams_.back()->bytes = std::move(bytes);
  }
}

void TcpSourceLink::Start() {
  for (size_t i = 0; i < streams_.size(); ++i) {
    threads_.emplace_back(&TcpSourceLink::SendLoop, this, i);
    threads_.emplace_back(&TcpSourceLink::AckLoop, this, i);
  }
}

TcpSourceLink::~TcpSourceLink() {
  Fail(absl::UnavailableError("tcp link: ended by this host"));
  for (std::thread& thread : threads_) thread.join();
}

void TcpSourceLink::Fail(const absl::Status& why) {
  MutexLock lock(&mu_);
  if (!status_.ok()) return;
  status_ = why;
  for (const auto& stream : streams_) {
    stream->bytes->Shutdown();
    stream->work.SignalAll();
  }
  news_cv_.SignalAll();
}

// A piece for which there is no room waits with its whole write; but a write larger than the queue
// must go some time, so each stream's queue takes anything while it is empty.
bool TcpSourceLink::HasRoom(const PageWrite& write) const {
  std::array<uint64_t, kMaxFrameStreams> wanted = {};
  ForEachPiece(write, streams_.size(),
               [&](size_t stream, const Frame& frame) { wanted[stream] += ChargedBytes(frame); });
  for (size_t i = 0; i < streams_.size(); ++i) {
    const uint64_t queued = streams_[i]->queued_bytes;
    if (queued > 0 && wanted[i] > 0 && queued + wanted[i] > options_.queue_bytes_per_stream) {
      return false;
    }
  }
  return true;
}

void TcpSourceLink::Push(Stream* stream, const Item& item) {
  stream->queue.push_back(item);
  stream->queued_bytes += ChargedBytes(item.frame);
  if (item.frame.type != FrameType::kCommit) stats_.queued_bytes += ChargedBytes(item.frame);
  if (stream->sender_waits) {
    stream->sender_waits = false;
    stream->work.Signal();
  }
}

void TcpSourceLink::Enqueue(const PageWrite& write) {
  if (free_writes_.empty()) {
    free_writes_.push_back(static_cast<uint32_t>(writes_.size()));
    writes_.emplace_back();
  }
  const uint32_t index = free_writes_.back();
  free_writes_.pop_back();
  writes_[index] = {write, write.run.count, MonotonicNow()};
  ForEachPiece(write, streams_.size(), [&](size_t stream, const Frame& frame) {
    mu_.AssertHeld();
    Push(streams_[stream].get(), {frame, index});
  });
}

absl::StatusOr<size_t> TcpSourceLink::Post(absl::Span<const PageWrite> writes) {
  MutexLock lock(&mu_);
  if (!status_.ok()) return status_;
  for (size_t i = 0; i < writes.size(); ++i) {
    const PageRun run = writes[i].run;
    if (!memory_->IsWithinOneRegion(run)) {
      if (i > 0) return i;
      return absl::InvalidArgumentError(absl::StrCat("tcp link: run of ", run.count, " pages from ",
                                                     run.first, " is not within one region"));
    }
    if (!HasRoom(writes[i])) return i;
    Enqueue(writes[i]);
  }
  return writes.size();
}

absl::StatusOr<CommitId> TcpSourceLink::PostCommit() {
  MutexLock lock(&mu_);
  if (!status_.ok()) return status_;
  if (newest_ - news_.committed >= kMaxCommits) {
    return absl::ResourceExhaustedError(
        absl::StrCat("tcp link: ", kMaxCommits, " commits are under way"));
  }
  Frame frame;
  frame.type = FrameType::kCommit;
  frame.commit = ++newest_;
  for (const auto& stream : streams_) Push(stream.get(), {frame, 0});
  return newest_;
}

absl::Status TcpSourceLink::Poll(LinkEvents* events) {
  MutexLock lock(&mu_);
  if (!status_.ok()) return status_;
  events->completed.insert(events->completed.end(), news_.completed.begin(), news_.completed.end());
  events->committed = news_.committed;
  told_ = news_.committed;
  news_.Clear();
  return absl::OkStatus();
}

absl::Status TcpSourceLink::Wait(absl::Time deadline) {
  MutexLock lock(&mu_);
  while (!HasNews()) {
    if (news_cv_.WaitWithDeadline(&mu_, deadline)) break;
  }
  return absl::OkStatus();
}

// The streams share the path: the one that heard from it last knows best.
void TcpSourceLink::AddPathState(LinkStats* stats) const {
  absl::Duration newest = kFreshAck;
  for (const auto& stream : streams_) {
    const std::optional<PathState> path = stream->bytes->path();
    if (!path) continue;
    stats->congestion_marks += path->retransmits;
    if (path->age > newest) continue;
    newest = path->age;
    stats->queueing_delay = path->queueing_delay;
    stats->round_trip = path->round_trip;
  }
}

LinkStats TcpSourceLink::stats() const {
  std::array<absl::Duration, 127> recent;
  LinkStats stats;
  size_t count = 0;
  {
    MutexLock lock(&mu_);
    stats = stats_;
    recent = latencies_;
    count = std::min<uint64_t>(measured_, recent.size());
  }
  AddPathState(&stats);
  if (count == 0) return stats;
  std::nth_element(recent.begin(), recent.begin() + count / 2, recent.begin() + count);
  stats.completion_latency = recent[count / 2];
  return stats;
}

void TcpSourceLink::SetPacing(uint64_t bytes_per_s) {
  // At least 1: 0 would lift the cap.
  const uint64_t share =
      bytes_per_s == 0 ? 0 : std::max<uint64_t>(1, bytes_per_s / streams_.size());
  for (const auto& stream : streams_) stream->bytes->SetPacing(share);
}

bool TcpSourceLink::TakeBatch(size_t index, std::vector<Item>* batch, bool* backlogged) {
  Stream& stream = *streams_[index];
  batch->clear();
  MutexLock lock(&mu_);
  while (stream.queue.empty() && status_.ok()) {
    stream.sender_waits = true;
    stream.work.Wait(&mu_);
  }
  if (!status_.ok()) return false;
  PageCount pages = 0;
  while (!stream.queue.empty() && batch->size() < FrameSender::kMaxBatchFrames) {
    const Item& item = stream.queue.front();
    if (item.frame.type == FrameType::kBytes) {
      if (pages + item.frame.run.count > FrameSender::kMaxBatchPages) break;
      pages += item.frame.run.count;
    }
    batch->push_back(item);
    stream.queue.pop_front();
  }
  *backlogged = !stream.queue.empty();
  return true;
}

void TcpSourceLink::FinishBatch(size_t index, absl::Span<const Item> batch, uint64_t wire_bytes) {
  const absl::Time now = MonotonicNow();
  MutexLock lock(&mu_);
  const bool had_news = HasNews();
  stats_.wire_bytes += wire_bytes;
  for (const Item& item : batch) {
    const uint64_t charged = ChargedBytes(item.frame);
    streams_[index]->queued_bytes -= charged;
    if (item.frame.type != FrameType::kCommit) stats_.queued_bytes -= charged;
    if (item.frame.type == FrameType::kCommit) {
      streams_[index]->sent = item.frame.commit;
      UpdateCommitted();
      continue;
    }
    Write& write = writes_[item.write_index];
    (write.write.zero ? stats_.zero_bytes : stats_.payload_bytes) +=
        PagesToBytes(item.frame.run.count);
    write.pages_left -= item.frame.run.count;
    if (write.pages_left > 0) continue;
    latencies_[measured_++ % latencies_.size()] = now - write.posted;
    news_.completed.push_back(write.write);
    free_writes_.push_back(item.write_index);
  }
  if (!had_news && HasNews()) news_cv_.SignalAll();
}

void TcpSourceLink::SendLoop(size_t index) {
  FrameSender sender(memory_, streams_[index]->bytes.get(), options_.compression);
  std::vector<Item> batch;
  std::vector<Frame> frames;
  bool backlogged = false;
  while (TakeBatch(index, &batch, &backlogged)) {
    frames.clear();
    for (const Item& item : batch) frames.push_back(item.frame);
    auto sent = sender.Send(frames, backlogged);
    if (!sent.ok()) {
      return Fail(absl::UnavailableError(
          absl::StrCat("tcp link, stream ", index, ": ", sent.status().message())));
    }
    FinishBatch(index, batch, *sent);
  }
}

absl::Status TcpSourceLink::CountAck(size_t index, absl::Span<const std::byte> header) {
  auto frame = DecodeFrame(header);
  if (!frame.ok()) return frame.status();
  MutexLock lock(&mu_);
  Stream& stream = *streams_[index];
  if (frame->type != FrameType::kAck || frame->commit != stream.acked + 1 ||
      frame->commit > newest_) {
    return absl::InvalidArgumentError("the target answered what was not asked");
  }
  stream.acked = frame->commit;
  UpdateCommitted();
  return absl::OkStatus();
}

// The answer to a commit may be here before its sender has said that it was sent: it counts then,
// so that no commit is reported before the writes it covers.
void TcpSourceLink::UpdateCommitted() {
  CommitId committed = newest_;
  for (const auto& stream : streams_) {
    committed = std::min({committed, stream->sent, stream->acked});
  }
  if (committed == news_.committed) return;
  news_.committed = committed;
  news_cv_.SignalAll();
}

void TcpSourceLink::AckLoop(size_t index) {
  std::array<std::byte, kFrameHeaderBytes> header;
  size_t have = 0;
  while (true) {
    const iovec part = {header.data() + have, header.size() - have};
    auto received = streams_[index]->bytes->Receive(absl::MakeConstSpan(&part, 1));
    absl::Status status = received.status();
    if (received.ok()) {
      have += *received;
      if (have < header.size()) continue;
      have = 0;
      status = CountAck(index, header);
    }
    if (!status.ok()) {
      return Fail(
          absl::UnavailableError(absl::StrCat("tcp link, stream ", index, ": ", status.message())));
    }
  }
}

}  // namespace presync
