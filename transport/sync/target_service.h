// The target's side of all sessions: accepts connections, tells control from data, and keeps the
// memory of sessions whose connection broke for a while, so that they can go on where they were.
#pragma once

#include <atomic>
#include <functional>
#include <list>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "transport/link.h"
#include "transport/memory.h"
#include "transport/mutex.h"
#include "transport/rdma/rdma_options.h"
#include "transport/sync/admission.h"
#include "transport/sync/guest_claims.h"
#include "transport/sync/handover_record.h"
#include "transport/sync/newcomers.h"
#include "transport/sync/peer_rules.h"
#include "transport/sync/refusal_log.h"
#include "transport/sync/session_id.h"
#include "transport/sync/state_budget.h"
#include "transport/sync/target_host.h"
#include "transport/tcp/byte_stream.h"
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
  AdmissionRules admission;
  PeerList peers;                           // who may push, by certificate; plain peers have none
  PeerRules everyone = {.max_guests = 64};  // for all peers together
  bool require_encryption = false;          // refuses RDMA, whose data is not encrypted
  uint32_t max_connections = 256;  // at a time: conversations, and connections that are new
  StateLimits state;
  // Handovers of one peer's guests of which records are kept here, each for a week: a session that
  // could add one more is refused.
  uint32_t max_records_of_a_peer = 1024;
  NewcomerLimits newcomers;  // of those that did not yet say who they are and what for
  absl::Duration preamble_timeout = absl::Seconds(5);
  absl::Duration idle_timeout = absl::Seconds(15);  // a source pings every second
  absl::Duration keep_lost_session = absl::Minutes(10);
  // Shared with recovery: what it does with a guest's QEMU no session of that guest begins beside.
  std::shared_ptr<GuestClaims> claims = std::make_shared<GuestClaims>();
  // Called with one line whenever an operator would want to know. Any thread.
  std::function<void(bool problem, const std::string& line)> log = [](bool, const std::string&) {};
};

// What a person sees of one guest that comes.
struct TargetStatus {
  std::string guest;
  std::string session;
  std::string peer;
  std::string peer_name;  // in the peer's certificate; empty: it showed none
  std::string state;      // "mirroring", "handover" or "lost" (kept for its source to come back)
};

// A session's memory and waiting guest, while no connection or one connection serves it.
struct TargetSlot {
  SessionId session = {};
  std::string guest;
  std::string peer;
  std::string peer_name;  // whose session it is: the name in the certificate; empty: plain
  uint64_t memory_bytes = 0;
  std::string state = "mirroring";
  std::unique_ptr<TargetPlace> place;
  std::string domain;     // libvirt's UUID of whose place it is; empty: not libvirt's
  bool reserved = false;  // the memory's files were whole: what is freed shows
  std::atomic<bool> content_kept = false;  // the memory holds what a session confirmed ...
  std::atomic<bool> noted = false;         // ... and a later presyncd can find it
  std::atomic<bool> older_copy = false;  // ... but another one than this, or before this began anew
  absl::Time lost_at = absl::InfiniteFuture();
  ControlChannel* channel = nullptr;  // of the conversation that serves it; null when lost
  bool busy = false;                  // a conversation is using `place`
  bool closing = false;               // ... and ends it: the guest's name will be free
  std::optional<absl::Status> launch_expected;  // the source's answer to the newest LaunchComing
};

// Where data connections wait until their session takes them.
struct StreamRendezvous {
  std::vector<Connection> streams;
  std::string peer_name;  // whose they are
  uint32_t arrived = 0;
  bool forgotten = false;
};

class TargetService {
 public:
  // `listener` is a listening socket; `host` must outlive the service. Takes up the copies that an
  // earlier presyncd left, as those of lost sessions, so recovery has to come first; then starts
  // its accepting thread.
  static std::unique_ptr<TargetService> Start(UniqueFd listener, TargetHost* host,
                                              TargetServiceOptions options);
  // Ends all conversations. Guests that run here are left alone; of sessions, the copies are left
  // to a later presyncd where that is possible, and removed elsewhere.
  ~TargetService();

  // Serves one connected socket in a thread of its own, as if it had been accepted. For tests.
  void Adopt(UniqueFd socket, std::string peer);

  std::vector<TargetStatus> status() const ABSL_LOCKS_EXCLUDED(mutex_);

  // For guests that libvirt manages ("target_launch.cc"): libvirt here is about to start the
  // process that waits for `guest`. Returns when its source is ready for that. FAILED_PRECONDITION:
  // the sync is not ready for a launch, with what it is; UNAVAILABLE, DEADLINE_EXCEEDED: no source
  // answers.
  absl::Status AnnounceLaunch(const std::string& guest, absl::Time deadline)
      ABSL_LOCKS_EXCLUDED(mutex_);
  // That process has ended. Ok if nothing was announced.
  void RetractLaunch(const std::string& guest, const std::string& why) ABSL_LOCKS_EXCLUDED(mutex_);

  // Ends all conversations; their sessions are kept for their sources to come back. For tests.
  void CloseConnections() ABSL_LOCKS_EXCLUDED(mutex_);

  // For the conversations ("target_session.cc").
  // ------------------------------------------------------
  const TargetServiceOptions& options() const { return options_; }
  TargetHost* host() { return host_; }
  StateBudget* state_budget() { return &state_budget_; }
  void Log(bool problem, const std::string& line) const { options_.log(problem, line); }
  // `channel`'s peer is not served, because of `why`. Said once, however often it comes again.
  void LogRefusal(const ControlChannel& channel, const absl::Status& why);

  // PERMISSION_DENIED: this peer is not on the list.
  absl::Status CheckPeer(const ControlChannel& channel) const;
  // How long a session that comes back waits for its old conversation to let go.
  static constexpr absl::Duration kTakeOverTimeout = absl::Seconds(10);

  // Null: no rules, a plain peer.
  const PeerRules* RulesOf(const ControlChannel& channel) const;

  // The slot of `session`, made if need be, marked busy. If another conversation of the same
  // session holds it, that one is ended first (its source has come back before we noticed). A lost
  // slot of an earlier session of the same guest, from the same source, is taken over with its
  // memory, an older copy. One of a source that had no certificate is ended for another source;
  // that of a peer with one is its own until it is given up. ALREADY_EXISTS: another session
  // mirrors the same guest, or its memory is kept for another peer. PERMISSION_DENIED: it is
  // another peer's session, or a guest that may not come from this one. RESOURCE_EXHAUSTED: as many
  // guests, or as much memory, as its rules or everyone's allow are here.
  absl::StatusOr<TargetSlot*> AcquireSlot(const SessionId& session, const std::string& guest,
                                          uint64_t memory_bytes, ControlChannel* channel)
      ABSL_LOCKS_EXCLUDED(mutex_);
  // Gives it back. `forget`: with all that it holds.
  void ReleaseSlot(TargetSlot* slot, bool forget) ABSL_LOCKS_EXCLUDED(mutex_);
  void SetSlotState(TargetSlot* slot, const std::string& state) ABSL_LOCKS_EXCLUDED(mutex_);

  // The source's answer to AnnounceLaunch.
  void NoteLaunchExpected(TargetSlot* slot, const wire::LaunchExpected& answer)
      ABSL_LOCKS_EXCLUDED(mutex_);

  // Data connections: a token is good from ExpectStreams until TakeStreams returns, for the peer of
  // `channel` only.
  SessionToken ExpectStreams(uint32_t count, const ControlChannel& channel)
      ABSL_LOCKS_EXCLUDED(mutex_);
  absl::StatusOr<std::vector<Connection>> TakeStreams(const SessionToken& token,
                                                      absl::Time deadline)
      ABSL_LOCKS_EXCLUDED(mutex_);
  // Has TakeStreams return at once: nobody wants them any more. Any token.
  void ForgetStreams(const SessionToken& token) ABSL_LOCKS_EXCLUDED(mutex_);

  // A session that has no conversation and no slot busy: what the records say. See
  // docs/protocol.md. Another peer than the session's is told nothing, and changes nothing.
  // `end_it`: a person at the source says that the guest goes on there.
  wire::Outcome Outcome(const SessionId& session, const std::string& guest,
                        const std::string& peer_name, bool end_it) ABSL_LOCKS_EXCLUDED(mutex_);

  // Makes sure that the guest of such a record, which waits for its state or was told to run and
  // does not, never runs, and writes so. Nobody else may have the guest in hand.
  absl::Status EndForGood(const HandoverEntry& entry);

 private:
  struct Client {
    std::thread thread;
    std::string address;
    Newcomers::Id id = 0;
    UniqueFd handle;       // of a newcomer's socket, to end it; guarded by mutex_
    bool dropped = false;  // to make room for others; guarded by mutex_
    std::atomic<bool> done = false;
  };

  TargetService(UniqueFd listener, TargetHost* host, TargetServiceOptions options);
  wire::Outcome OutcomeOf(const HandoverEntry& entry, bool end_it);
  void TakeKept() ABSL_LOCKS_EXCLUDED(mutex_);
  void AcceptLoop();
  size_t CountDropped() const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  // Forgets those that have ended, and waits until few that were dropped have not.
  void AwaitDropped() ABSL_LOCKS_EXCLUDED(mutex_);
  // Ends a newcomer if there is no room for another one from `address`. RESOURCE_EXHAUSTED: there
  // is none all the same.
  absl::Status MakeRoom(const std::string& address) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void Drop(Newcomers::Id id) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  // It has said who it is, with a certificate if it is `known`, or is gone. Whether it was dropped.
  bool LeaveNewcomers(Client* client, bool known) ABSL_LOCKS_EXCLUDED(mutex_);
  void Serve(Client* client, UniqueFd socket, const std::string& peer);
  absl::Status DeliverStream(const Preamble& preamble, Connection connection)
      ABSL_LOCKS_EXCLUDED(mutex_);
  absl::Status CheckUse(const TargetSlot* except, const std::string& guest, uint64_t memory_bytes,
                        const std::string& peer_name) const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  bool IsOthers(const SessionId& session, const std::string& peer_name) const
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  TargetSlot* FindServed(const std::string& guest) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  // Ends the place of a busy slot, then the slot.
  void EndSlot(TargetSlot* slot) ABSL_LOCKS_EXCLUDED(mutex_);
  void JoinEnded() ABSL_LOCKS_EXCLUDED(mutex_);
  void Sweep() ABSL_LOCKS_EXCLUDED(mutex_);

  const UniqueFd listener_;
  TargetHost* const host_;
  const TargetServiceOptions options_;
  RefusalLog refusals_;
  StateBudget state_budget_;
  std::atomic<bool> ending_ = false;

  mutable Mutex mutex_;
  std::list<TargetSlot> slots_ ABSL_GUARDED_BY(mutex_);
  std::map<SessionToken, StreamRendezvous> rendezvous_ ABSL_GUARDED_BY(mutex_);
  std::list<Client> clients_ ABSL_GUARDED_BY(mutex_);
  Newcomers newcomers_ ABSL_GUARDED_BY(mutex_);
  Newcomers::Id last_id_ ABSL_GUARDED_BY(mutex_) = 0;

  std::thread acceptor_;  // last: it uses all of the above
};

}  // namespace presync
