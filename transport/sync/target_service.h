// The target's side of all sessions: accepts connections, tells control from data, and keeps the
// memory of sessions whose connection broke for a while, so that they can go on where they were.
#pragma once

#include <atomic>
#include <functional>
#include <list>
#include <map>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "transport/link.h"
#include "transport/memory.h"
#include "transport/rdma/rdma_options.h"
#include "transport/sync/session_id.h"
#include "transport/sync/target_host.h"
#include "transport/tcp/byte_stream.h"
#include "transport/unique_fd.h"
#include "transport/wire/control_channel.h"
#include "transport/wire/preamble.h"

namespace presync {

// Brings up the target's end of a link that stands in for TCP, offered under this token. For tests
// of sessions over a link of their own.
using MakeTargetLink = std::function<absl::StatusOr<std::unique_ptr<TargetLink>>(
    const SessionToken& token, const GuestMemory* memory, absl::Time deadline)>;

struct TargetServiceOptions {
  std::string record_folder;
  SocketOptions socket;
  RdmaTargetOptions rdma;
  MakeTargetLink make_link = nullptr;  // null: TCP connections
  uint32_t max_tcp_streams = 16;
  uint32_t max_connections = 256;  // at once, of all kinds; more are closed at once
  absl::Duration preamble_timeout = absl::Seconds(5);
  absl::Duration idle_timeout = absl::Seconds(15);  // a source pings every second
  absl::Duration keep_lost_session = absl::Minutes(10);
  // Called with one line whenever an operator would want to know. Any thread.
  std::function<void(bool problem, const std::string& line)> log = [](bool, const std::string&) {};
};

// What a person sees of one guest that comes.
struct TargetStatus {
  std::string guest;
  std::string session;
  std::string peer;
  std::string state;  // "mirroring", "handover" or "lost" (kept for its source to come back)
};

// A session's memory and waiting guest, while no connection or one connection serves it.
struct TargetSlot {
  SessionId session = {};
  std::string guest;
  std::string peer;
  std::string state = "mirroring";
  std::unique_ptr<TargetPlace> place;
  std::atomic<bool> content_kept = false;  // the memory holds what this session confirmed
  absl::Time lost_at = absl::InfiniteFuture();
  ControlChannel* channel = nullptr;  // of the conversation that serves it; null when lost
  bool busy = false;                  // a conversation is using `place`
};

// Where data connections wait until their session takes them.
struct StreamRendezvous {
  std::vector<UniqueFd> streams;
  uint32_t arrived = 0;
  bool forgotten = false;
};

class TargetService {
 public:
  // `listener` is a listening socket; `host` must outlive the service. Starts its accepting thread.
  static std::unique_ptr<TargetService> Start(UniqueFd listener, TargetHost* host,
                                              TargetServiceOptions options);
  // Ends all conversations. Guests that run here are left alone; places of sessions are removed.
  ~TargetService();

  // Serves one connected socket in a thread of its own, as if it had been accepted. For tests.
  void Adopt(UniqueFd socket, std::string peer);

  std::vector<TargetStatus> status() const ABSL_LOCKS_EXCLUDED(mutex_);

  // Ends all conversations; their sessions are kept for their sources to come back. For tests.
  void CloseConnections() ABSL_LOCKS_EXCLUDED(mutex_);

  // For the conversations ("target_session.cc").
  // ------------------------------------------------------
  const TargetServiceOptions& options() const { return options_; }
  TargetHost* host() { return host_; }
  void Log(bool problem, const std::string& line) const { options_.log(problem, line); }

  // The slot of `session`, made if need be, marked busy. If another conversation of the same
  // session holds it, that one is ended first (its source has come back before we noticed).
  // ALREADY_EXISTS: another session mirrors the same guest.
  absl::StatusOr<TargetSlot*> AcquireSlot(const SessionId& session, const std::string& guest,
                                          ControlChannel* channel) ABSL_LOCKS_EXCLUDED(mutex_);
  // Gives it back. `forget`: with all that it holds.
  void ReleaseSlot(TargetSlot* slot, bool forget) ABSL_LOCKS_EXCLUDED(mutex_);
  void SetSlotState(TargetSlot* slot, const std::string& state) ABSL_LOCKS_EXCLUDED(mutex_);

  // Data connections: a token is good from ExpectStreams until TakeStreams returns.
  SessionToken ExpectStreams(uint32_t count) ABSL_LOCKS_EXCLUDED(mutex_);
  absl::StatusOr<std::vector<UniqueFd>> TakeStreams(const SessionToken& token, absl::Time deadline)
      ABSL_LOCKS_EXCLUDED(mutex_);
  // Has TakeStreams return at once: nobody wants them any more. Any token.
  void ForgetStreams(const SessionToken& token) ABSL_LOCKS_EXCLUDED(mutex_);

  // A session that has no conversation and no slot busy: what the records say. See
  // docs/protocol.md.
  wire::Outcome Outcome(const SessionId& session, const std::string& guest)
      ABSL_LOCKS_EXCLUDED(mutex_);

 private:
  struct Connection {
    std::thread thread;
    std::atomic<bool> done = false;
  };

  TargetService(UniqueFd listener, TargetHost* host, TargetServiceOptions options);
  void AcceptLoop();
  void Serve(UniqueFd socket, const std::string& peer);
  void DeliverStream(const Preamble& preamble, UniqueFd socket) ABSL_LOCKS_EXCLUDED(mutex_);
  void Sweep() ABSL_LOCKS_EXCLUDED(mutex_);

  const UniqueFd listener_;
  TargetHost* const host_;
  const TargetServiceOptions options_;
  std::atomic<bool> ending_ = false;

  mutable absl::Mutex mutex_;
  std::list<TargetSlot> slots_ ABSL_GUARDED_BY(mutex_);
  std::map<SessionToken, StreamRendezvous> rendezvous_ ABSL_GUARDED_BY(mutex_);
  std::list<Connection> connections_ ABSL_GUARDED_BY(mutex_);

  std::thread acceptor_;  // last: it uses all of the above
};

}  // namespace presync
