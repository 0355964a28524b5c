// The target's end of the TCP link: what arrives goes straight into guest RAM. Nothing that the
// peer says is trusted: a frame that is malformed or out of place ends the link, and no byte is
// written outside the pages that a well-formed frame names.
//
// Threads: one a stream.
#pragma once

#include <atomic>
#include <cstddef>
#include <memory>
#include <thread>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "transport/link.h"
#include "transport/memory.h"
#include "transport/mutex.h"
#include "transport/tcp/byte_stream.h"
#include "transport/unique_fd.h"

namespace presync {

class TcpTargetLink final : public TargetLink {
 public:
  // Over streams that are connected to the source, which has them in the same order. `memory` must
  // outlive the link. INVALID_ARGUMENT: no stream, more than kMaxFrameStreams, or (first form) one
  // that is not a connected socket.
  static absl::StatusOr<std::unique_ptr<TcpTargetLink>> Create(const GuestMemory* memory,
                                                               std::vector<UniqueFd> sockets,
                                                               const SocketOptions& options);
  static absl::StatusOr<std::unique_ptr<TcpTargetLink>> Create(
      const GuestMemory* memory, std::vector<std::unique_ptr<ByteStream>> streams);
  ~TcpTargetLink() override;

  std::string_view name() const override { return "tcp"; }
  absl::Status health() const override;
  void Close() override;

 private:
  class Receiver;
  TcpTargetLink(const GuestMemory* memory, std::vector<std::unique_ptr<ByteStream>> streams);
  void Start();
  void Fail(const absl::Status& why);

  const GuestMemory* const memory_;
  const std::vector<std::unique_ptr<ByteStream>> streams_;
  // Kept until the link goes: freeing their buffers would hold up Close, and with it a launch.
  std::vector<std::unique_ptr<Receiver>> receivers_;
  std::atomic<bool> over_ = false;  // nothing more is received
  mutable Mutex mu_;
  absl::Status status_ ABSL_GUARDED_BY(mu_);
  Mutex close_mu_;  // held while joining, so that a second Close returns no earlier
  std::vector<std::thread> threads_ ABSL_GUARDED_BY(close_mu_);
};

}  // namespace presync
