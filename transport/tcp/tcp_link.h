#pragma once
#include <atomic>
#include <deque>
#include <memory>
#include <thread>
#include <vector>
#include "absl/synchronization/mutex.h"
#include "transport/link.h"
#include "transport/memory.h"
#include "transport/unique_fd.h"
namespace presync {
enum class TcpCompression { kNone, kLz4, kZstd, kAuto };
struct TcpLinkOptions { TcpCompression compression = TcpCompression::kAuto; };
class TcpSourceLink final : public SourceLink {
 public:
  static absl::StatusOr<std::unique_ptr<TcpSourceLink>> Create(const GuestMemory* m, std::vector<UniqueFd> s, const TcpLinkOptions&);
  ~TcpSourceLink() override;
  std::string_view name() const override { return "tcp"; }
  absl::StatusOr<size_t> Post(absl::Span<const PageWrite>) override;
  absl::StatusOr<CommitId> PostCommit() override;
  absl::Status Poll(LinkEvents*) override;
  absl::Status Wait(absl::Time) override;
  LinkStats stats() const override;
  void SetPacing(uint64_t) override {}
 private:
  struct Item { PageWrite write; CommitId commit = 0; };
  struct Stream { UniqueFd fd; std::deque<Item> q; uint64_t bytes = 0; CommitId acked = 0; std::thread tx, rx; };
  void Tx(Stream*); void Rx(Stream*);
  const GuestMemory* mem_;
  mutable absl::Mutex mu_;
  std::vector<std::unique_ptr<Stream>> streams_;
  std::vector<PageWrite> done_;
  CommitId next_ = 0;
  bool broken_ = false, ending_ = false, news_ = false;
  uint64_t wire_ = 0, payload_ = 0, zero_ = 0;
};
class TcpTargetLink final : public TargetLink {
 public:
  static absl::StatusOr<std::unique_ptr<TcpTargetLink>> Create(const GuestMemory* m, std::vector<UniqueFd> s, const TcpLinkOptions&);
  ~TcpTargetLink() override { Close(); }
  std::string_view name() const override { return "tcp"; }
  absl::Status health() const override;
  void Close() override;
 private:
  void Rx(int fd);
  const GuestMemory* mem_;
  mutable absl::Mutex mu_;
  absl::Status health_;
  std::vector<UniqueFd> fds_;
  std::vector<std::thread> threads_;
};
}
