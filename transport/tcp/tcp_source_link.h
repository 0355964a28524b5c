// The source's end of the TCP link: several streams, sharded by address (frame.h), so that a page's
// writes stay in order and the streams share the load.
//
// Completed means: given to the kernel. A commit is a marker on every stream, which the target
// answers on that stream when everything before it is in its memory.
//
// Threads: two a stream, one that sends from its queue and one that waits for answers.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <memory>
#include <thread>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "transport/link.h"
#include "transport/memory.h"
#include "transport/mutex.h"
#include "transport/tcp/byte_stream.h"
#include "transport/tcp/frame.h"
#include "transport/tcp/tcp_options.h"
#include "transport/unique_fd.h"

namespace presync {

class TcpSourceLink final : public SourceLink {
 public:
  static constexpr size_t kMaxCommits = 64;

  // Over streams that are connected to the target, which has them in the same order. `memory` must
  // outlive the link. INVALID_ARGUMENT: no stream, more than kMaxFrameStreams, or (first form) one
  // that is not a connected socket.
  static absl::StatusOr<std::unique_ptr<TcpSourceLink>> Create(const GuestMemory* memory,
                                                               std::vector<UniqueFd> sockets,
                                                               const TcpSourceOptions& options,
                                                               const SocketOptions& socket_options);
  static absl::StatusOr<std::unique_ptr<TcpSourceLink>> Create(
      const GuestMemory* memory, std::vector<std::unique_ptr<ByteStream>> streams,
      const TcpSourceOptions& options);
  ~TcpSourceLink() override;

  std::string_view name() const override { return "tcp"; }
  absl::StatusOr<size_t> Post(absl::Span<const PageWrite> writes) override;
  absl::StatusOr<CommitId> PostCommit() override;
  absl::Status Poll(LinkEvents* events) override;
  absl::Status Wait(absl::Time deadline) override;
  LinkStats stats() const override;
  void SetPacing(uint64_t bytes_per_s) override;

 private:
  // What one frame will carry: a piece of a write, or a commit.
  struct Item {
    Frame frame;           // kBytes, kZero or kCommit
    uint32_t write_index;  // in writes_; not for a commit
  };
  struct Write {
    PageWrite write;
    PageCount pages_left = 0;  // not yet sent
    absl::Time posted;
  };
  struct Stream {
    std::unique_ptr<ByteStream> bytes;
    std::deque<Item> queue;
    uint64_t queued_bytes = 0;
    bool sender_waits = false;
    CondVar work;
    CommitId sent = 0;   // newest commit given to the network
    CommitId acked = 0;  // newest commit that the target confirmed
  };

  TcpSourceLink(const GuestMemory* memory, std::vector<std::unique_ptr<ByteStream>> streams,
                const TcpSourceOptions& options);
  void Start();
  void SendLoop(size_t index);
  void AckLoop(size_t index);
  absl::Status CountAck(size_t index, absl::Span<const std::byte> header);
  void Fail(const absl::Status& why);
  bool HasRoom(const PageWrite& write) const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void Enqueue(const PageWrite& write) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void Push(Stream* stream, const Item& item) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  // The next items to send together; false: the link is over.
  bool TakeBatch(size_t index, std::vector<Item>* batch, bool* backlogged);
  void AddPathState(LinkStats* stats) const;
  void UpdateCommitted() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void FinishBatch(size_t index, absl::Span<const Item> batch, uint64_t wire_bytes);
  bool HasNews() const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) {
    return !news_.completed.empty() || news_.committed != told_ || !status_.ok();
  }

  const GuestMemory* const memory_;
  const TcpSourceOptions options_;

  // One lock for all streams: it is taken twice a batch of up to 256 KiB.
  mutable Mutex mu_;
  // The vector and its `bytes` never change after the link was made; the rest is guarded by mu_.
  std::vector<std::unique_ptr<Stream>> streams_;
  CondVar news_cv_;
  std::vector<Write> writes_ ABSL_GUARDED_BY(mu_);  // by write_index; free ones are reused
  std::vector<uint32_t> free_writes_ ABSL_GUARDED_BY(mu_);
  LinkEvents news_ ABSL_GUARDED_BY(mu_);      // since the last Poll
  CommitId told_ ABSL_GUARDED_BY(mu_) = 0;    // newest commit that Poll reported
  CommitId newest_ ABSL_GUARDED_BY(mu_) = 0;  // newest commit posted
  absl::Status status_ ABSL_GUARDED_BY(mu_);
  LinkStats stats_ ABSL_GUARDED_BY(mu_);
  std::array<absl::Duration, 127> latencies_ ABSL_GUARDED_BY(mu_);  // of recent writes, a ring
  uint64_t measured_ ABSL_GUARDED_BY(mu_) = 0;                      // latencies ever

  std::vector<std::thread> threads_;  // last: they use all of the above
};

}  // namespace presync
