// The source's end of the RDMA link. Guest memory is divided into shards of 2 MiB; shard s goes by
// queue pair s modulo their number, so that all that concerns a page goes by one queue pair, in
// order. Pages with content are plain writes, chained into one doorbell a queue pair and Post;
// zero runs and commits are messages, which the target answers.
//
// Completed means: the device reported a write's completion, or the target answered a zero run. A
// commit is sent on every queue pair once every write posted before it has completed, and is
// confirmed when every queue pair's target end has answered.
//
// Set-up is in rdma_source_setup.cc. Threads: one that waits for the connection manager's news.
#pragma once

#include <array>
#include <atomic>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "transport/link.h"
#include "transport/memory.h"
#include "transport/mutex.h"
#include "transport/rdma/adapter.h"
#include "transport/rdma/connection_manager.h"
#include "transport/rdma/rdma_link.h"
#include "transport/unique_fd.h"

namespace presync {

class RdmaSourceLink final : public SourceLink {
 public:
  static constexpr size_t kMaxCommits = 64;

  // See ConnectRdma.
  static absl::StatusOr<std::unique_ptr<RdmaSourceLink>> Connect(const GuestMemory* memory,
                                                                 const RdmaOffer& offer,
                                                                 const RdmaSourceOptions& options,
                                                                 absl::Time deadline);
  ~RdmaSourceLink() override;

  std::string_view name() const override { return "rdma"; }
  absl::StatusOr<size_t> Post(absl::Span<const PageWrite> writes) override;
  absl::StatusOr<CommitId> PostCommit() override;
  absl::Status Poll(LinkEvents* events) override;
  absl::Status Wait(absl::Time deadline) override;
  LinkStats stats() const override;
  void SetPacing(uint64_t) override {}  // the device has its own congestion control

  std::vector<std::string> devices() const;

 private:
  friend class RdmaSourceSetup;

  // What a device needs to know to write into a shard.
  struct ShardKeys {
    uint64_t remote_address = 0;  // of its first byte
    uint32_t remote_key = 0;
    uint32_t local_key = 0;
  };
  struct Device {
    RdmaAdapter adapter;
    std::vector<ShardKeys> shards;  // by shard
    bool armed = false;             // the completion queue will give an event
  };
  // A part of a write, within one shard.
  struct Piece {
    uint32_t write = 0;  // in writes_
    PageCount pages = 0;
    int64_t posted_ns = 0;
    bool ends_request = false;  // the last piece of its work request
    bool found_idle = false;    // little else of ours was under way
  };
  // A message that waits for its answer.
  struct Sent {
    uint32_t runs = 0;
    CommitId commit = 0;
    std::array<uint32_t, kMaxMessageRuns> write = {};
    std::array<PageCount, kMaxMessageRuns> pages = {};
  };
  struct Queue {
    size_t device = 0;
    uint32_t index = 0;  // in queues_
    CmId id;
    uint32_t inline_bytes = 0;
    size_t first_buffer = 0;  // of its kMessageWindow for sending, then as many for receiving

    // Writes: pieces in the order of their posting, a ring of a power of 2.
    std::vector<Piece> pieces;
    uint32_t piece_tail = 0;  // numbers wrap
    uint32_t piece_head = 0;
    uint32_t requests = 0;  // work requests under way or in the chain
    // The chain that the next doorbell starts.
    std::vector<ibv_send_wr> chain;
    std::vector<ibv_sge> parts;
    uint32_t chained = 0;
    uint32_t since_signal = 0;
    uint64_t bytes_since_signal = 0;
    size_t chain_shard = 0;
    PageIndex chain_end = 0;  // page after the last request's

    // Messages.
    RdmaMessage open;  // zero runs that were not sent yet
    Sent open_sent;
    std::array<Sent, kMessageWindow> sent;  // by number
    uint64_t messages_sent = 0;
    uint64_t messages_answered = 0;
    CommitId commit_sent = 0;
    CommitId commit_answered = 0;
  };
  struct Write {
    PageWrite write;
    PageCount pages_left = 0;
    uint32_t epoch = 0;  // of the commit that will cover it, modulo kEpochs
    uint64_t charged_bytes = 0;
  };
  // The ring of latencies of recent writes.
  class Latencies {
   public:
    void Add(int64_t ns) { recent_[measured_++ % recent_.size()] = ns; }
    absl::Duration Median() const;

   private:
    std::array<int64_t, 127> recent_ = {};
    uint64_t measured_ = 0;
  };
  static constexpr size_t kEpochs = 128;
  static_assert(kEpochs > kMaxCommits + 1);

  RdmaSourceLink(const GuestMemory* memory, const RdmaSourceOptions& options);
  void Start();
  void Watch();

  // Data path (rdma_source_link.cc). Each of them may find the link broken: then status_ says so.
  bool Alive();
  void Fail(absl::Status why);
  bool HasRoom(const PageWrite& write) const;
  void Accept(const PageWrite& write);
  void GoOnWithPartial();
  bool PostPiece(PageRun piece, uint32_t write);
  bool PostZero(Queue* queue, PageRun piece, uint32_t write);
  void Chain(Queue* queue, size_t shard, PageRun piece, uint32_t write);
  void RingDoorbells();
  void RingDoorbell(Queue* queue);
  bool MessageRoom(const Queue& queue) const {
    return queue.messages_sent - queue.messages_answered < kMessageWindow;
  }
  void SendOpen(Queue* queue);
  void SendMessage(Queue* queue, RdmaMessage* message, const Sent& sent);
  void SendCommits();

  // Completions (rdma_source_completions.cc).
  void Progress();
  void Drain(Device* device);
  void OnCompletion(const ibv_wc& completion, int64_t now_ns);
  void OnAnswer(Queue* queue, const ibv_wc& completion);
  void RetirePieces(Queue* queue, uint32_t until, int64_t now_ns);
  void Retire(uint32_t write, PageCount pages);
  void CheckStall(int64_t now_ns);
  bool Outstanding() const;
  bool HasNews() const { return !news_.completed.empty() || news_.committed != told_; }
  void Sleep(absl::Time deadline);

  // Which shard holds a page, and which pages of `run` come first and lie in one shard.
  struct Place {
    size_t shard = 0;
    size_t region = 0;
    uint64_t offset_bytes = 0;  // within the shard
  };
  Place PlaceOf(PageIndex page) const;
  PageRun TakePiece(PageRun* run, bool zero) const;

  const GuestMemory* const memory_;
  const RdmaSourceOptions options_;
  PageCount max_write_pages_ = 256;
  uint32_t depth_ = 64;
  std::vector<size_t> first_shards_;  // of each region

  std::unique_ptr<CmChannel> channel_;
  std::vector<Device> devices_;
  std::vector<Queue> queues_;

  std::vector<Write> writes_;
  std::vector<uint32_t> free_writes_;
  PageRun partial_ = {};  // of a write that was accepted and is not all posted yet
  uint32_t partial_write_ = 0;
  std::array<uint32_t, kEpochs> outstanding_ = {};  // writes, by epoch
  uint32_t outstanding_writes_ = 0;
  CommitId newest_ = 0;  // posted
  CommitId ready_ = 0;   // all their writes have completed
  CommitId told_ = 0;
  LinkEvents news_;
  LinkStats stats_;
  Latencies latencies_;
  Latencies idle_latencies_;
  int64_t last_progress_ns_ = 0;
  absl::Status status_;

  mutable uint64_t marks_ = 0;
  mutable absl::Time next_marks_ = absl::InfinitePast();

  // From the watching thread.
  UniqueFd wake_;  // an eventfd: readable when the link is broken
  UniqueFd stop_;  // an eventfd: the watching thread shall end
  std::atomic<bool> broken_ = false;
  Mutex mu_;
  absl::Status broken_status_ ABSL_GUARDED_BY(mu_);
  std::thread watcher_;  // last: it uses the above
};

}  // namespace presync
