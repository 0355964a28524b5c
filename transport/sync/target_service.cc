#include "transport/sync/target_service.h"

#include <errno.h>
#include <poll.h>
#include <sys/socket.h>

#include <algorithm>
#include <cstring>
#include <utility>

#include "absl/strings/str_cat.h"
#include "transport/sync/handover_record.h"
#include "transport/sync/target_session.h"
#include "transport/tcp/socket.h"

namespace presync {
namespace {

// How often the acceptor looks for expired sessions and ended threads.
constexpr absl::Duration kSweepEvery = absl::Milliseconds(200);
// How long a session that comes back waits for its old conversation to let go.
constexpr absl::Duration kTakeOverTimeout = absl::Seconds(10);

// Reads exactly one preamble; slow or short peers fail.
absl::StatusOr<Preamble> ReadPreamble(int fd, absl::Duration timeout) {
  const absl::Time deadline = absl::Now() + timeout;
  uint8_t bytes[kPreambleBytes];
  size_t have = 0;
  while (have < sizeof(bytes)) {
    const int64_t left_ms = absl::ToInt64Milliseconds(deadline - absl::Now());
    pollfd p = {.fd = fd, .events = POLLIN, .revents = 0};
    if (left_ms <= 0 || ::poll(&p, 1, static_cast<int>(left_ms)) <= 0) {
      return absl::DeadlineExceededError("it did not say what it is for");
    }
    const ssize_t n = ::recv(fd, bytes + have, sizeof(bytes) - have, MSG_DONTWAIT);
    if (n > 0) {
      have += static_cast<size_t>(n);
    } else if (n == 0 || (errno != EAGAIN && errno != EINTR)) {
      return absl::UnavailableError("it was closed before it said what it is for");
    }
  }
  return DecodePreamble(bytes);
}

}  // namespace

std::unique_ptr<TargetService> TargetService::Start(UniqueFd listener, TargetHost* host,
                                                    TargetServiceOptions options) {
  std::unique_ptr<TargetService> service(
      new TargetService(std::move(listener), host, std::move(options)));
  service->acceptor_ = std::thread([raw = service.get()] { raw->AcceptLoop(); });
  return service;
}

TargetService::TargetService(UniqueFd listener, TargetHost* host, TargetServiceOptions options)
    : listener_(std::move(listener)), host_(host), options_(std::move(options)) {}

TargetService::~TargetService() {
  ending_ = true;
  acceptor_.join();
  CloseConnections();
  std::list<Connection> connections;
  {
    absl::MutexLock lock(&mutex_);
    connections.swap(connections_);
  }
  for (Connection& connection : connections) connection.thread.join();
}

void TargetService::CloseConnections() {
  absl::MutexLock lock(&mutex_);
  for (TargetSlot& slot : slots_) {
    if (slot.channel != nullptr) slot.channel->Shutdown();
  }
}

void TargetService::AcceptLoop() {
  absl::Time next_sweep = absl::Now();
  while (!ending_) {
    if (absl::Now() >= next_sweep) {
      Sweep();
      next_sweep = absl::Now() + kSweepEvery;
    }
    absl::StatusOr<UniqueFd> accepted = Accept(listener_.get(), absl::Now() + kSweepEvery);
    if (accepted.ok()) {
      std::string peer = PeerName(accepted->get());
      Adopt(*std::move(accepted), std::move(peer));
    }
  }
}

void TargetService::Adopt(UniqueFd socket, std::string peer) {
  absl::MutexLock lock(&mutex_);
  if (connections_.size() >= options_.max_connections) {
    Log(true, absl::StrCat("refused ", peer, ": ", connections_.size(), " connections are open"));
    return;
  }
  Connection& connection = connections_.emplace_back();
  connection.thread = std::thread(
      [this, &connection, peer = std::move(peer), socket = std::move(socket)]() mutable {
        Serve(std::move(socket), peer);
        connection.done = true;
      });
}

void TargetService::Serve(UniqueFd socket, const std::string& peer) {
  const absl::StatusOr<Preamble> preamble = ReadPreamble(socket.get(), options_.preamble_timeout);
  if (!preamble.ok()) {
    Log(true, absl::StrCat("refused a connection from ", peer, ": ", preamble.status().message()));
    return;
  }
  if (preamble->kind == Preamble::Kind::kData) {
    DeliverStream(*preamble, std::move(socket));
    return;
  }
  ControlChannel channel(std::move(socket), peer);
  RunTargetConversation(this, &channel);
}

SessionToken TargetService::ExpectStreams(uint32_t count) {
  const SessionToken token = RandomId();
  absl::MutexLock lock(&mutex_);
  rendezvous_[token].streams.resize(count);
  return token;
}

void TargetService::DeliverStream(const Preamble& preamble, UniqueFd socket) {
  absl::MutexLock lock(&mutex_);
  const auto it = rendezvous_.find(preamble.token);
  if (it == rendezvous_.end() || preamble.stream >= it->second.streams.size() ||
      it->second.streams[preamble.stream].valid()) {
    Log(true, "refused a data connection: its token or stream number is not expected");
    return;
  }
  it->second.streams[preamble.stream] = std::move(socket);
  ++it->second.arrived;
}

absl::StatusOr<std::vector<UniqueFd>> TargetService::TakeStreams(const SessionToken& token,
                                                                 absl::Time deadline) {
  absl::MutexLock lock(&mutex_);
  StreamRendezvous& rendezvous = rendezvous_[token];
  const auto complete = [&rendezvous, this] {
    return rendezvous.arrived == rendezvous.streams.size() || rendezvous.forgotten || ending_;
  };
  mutex_.AwaitWithDeadline(absl::Condition(&complete), deadline);
  const bool all = rendezvous.arrived == rendezvous.streams.size() && !ending_;
  std::vector<UniqueFd> streams = std::move(rendezvous.streams);
  rendezvous_.erase(token);
  if (!all) return absl::DeadlineExceededError("the source did not open its data connections");
  return streams;
}

void TargetService::ForgetStreams(const SessionToken& token) {
  absl::MutexLock lock(&mutex_);
  const auto it = rendezvous_.find(token);
  if (it != rendezvous_.end()) it->second.forgotten = true;
}

absl::StatusOr<TargetSlot*> TargetService::AcquireSlot(const SessionId& session,
                                                       const std::string& guest,
                                                       ControlChannel* channel) {
  std::list<TargetSlot> replaced;  // a place may take its time to end: not under the lock
  absl::MutexLock lock(&mutex_);
  const auto find = [&] {
    return std::find_if(slots_.begin(), slots_.end(),
                        [&](const TargetSlot& slot) { return slot.guest == guest; });
  };
  auto it = find();
  if (it != slots_.end() && it->session == session && it->busy) {
    if (it->channel != nullptr) it->channel->Shutdown();
    const auto let_go = [&] { return find() == slots_.end() || !find()->busy; };
    mutex_.AwaitWithTimeout(absl::Condition(&let_go), kTakeOverTimeout);
    it = find();
  }
  if (it != slots_.end() && it->session != session && !it->busy) {
    // A lost session of the same guest: its source has begun anew, so nobody will come back for it.
    replaced.splice(replaced.end(), slots_, it);
    it = slots_.end();
  }
  if (it != slots_.end() && (it->busy || it->session != session)) {
    return absl::AlreadyExistsError(
        absl::StrCat("guest ", guest, " is already being mirrored here, from ", it->peer,
                     "; stop that sync first (presync stop ", guest, ", on its source)"));
  }
  TargetSlot& slot = it != slots_.end() ? *it : slots_.emplace_back();
  slot.session = session;
  slot.guest = guest;
  slot.peer = channel->peer();
  slot.state = "mirroring";
  slot.channel = channel;
  slot.busy = true;
  slot.lost_at = absl::InfiniteFuture();
  return &slot;
}

void TargetService::ReleaseSlot(TargetSlot* slot, bool forget) {
  std::list<TargetSlot> dropped;  // a place may take its time to end: not under the lock
  absl::MutexLock lock(&mutex_);
  slot->busy = false;
  slot->channel = nullptr;
  slot->lost_at = absl::Now();
  slot->state = "lost";
  if (!forget && slot->place != nullptr) return;
  const auto it = std::find_if(slots_.begin(), slots_.end(),
                               [slot](const TargetSlot& each) { return &each == slot; });
  dropped.splice(dropped.begin(), slots_, it);
}

void TargetService::SetSlotState(TargetSlot* slot, const std::string& state) {
  absl::MutexLock lock(&mutex_);
  slot->state = state;
}

void TargetService::Sweep() {
  std::list<TargetSlot> expired;
  std::list<Connection> ended;
  {
    absl::MutexLock lock(&mutex_);
    for (auto it = slots_.begin(); it != slots_.end();) {
      const auto next = std::next(it);
      if (!it->busy && absl::Now() - it->lost_at > options_.keep_lost_session) {
        expired.splice(expired.end(), slots_, it);
      }
      it = next;
    }
    for (auto it = connections_.begin(); it != connections_.end();) {
      const auto next = std::next(it);
      if (it->done) ended.splice(ended.end(), connections_, it);
      it = next;
    }
  }
  for (Connection& connection : ended) connection.thread.join();
  for (const TargetSlot& slot : expired) {
    Log(true, absl::StrCat(slot.guest, ": its source did not come back; its memory is given up"));
  }
}

std::vector<TargetStatus> TargetService::status() const {
  std::vector<TargetStatus> all;
  absl::MutexLock lock(&mutex_);
  for (const TargetSlot& slot : slots_) {
    TargetStatus status = {.guest = slot.guest,
                           .session = IdToHex(slot.session),
                           .peer = slot.peer,
                           .state = slot.state};
    all.push_back(std::move(status));
  }
  return all;
}

wire::Outcome TargetService::Outcome(const SessionId& session, const std::string& guest) {
  wire::Outcome outcome;
  {
    // While a conversation still has the guest in hand its fate is open: end it, then read the
    // record.
    absl::MutexLock lock(&mutex_);
    const auto in_hand = [&] {
      return std::any_of(slots_.begin(), slots_.end(), [&](const TargetSlot& slot) {
        return slot.session == session && slot.busy;
      });
    };
    for (TargetSlot& slot : slots_) {
      if (slot.session == session && slot.busy && slot.channel != nullptr) slot.channel->Shutdown();
    }
    const auto free = [&] { return !in_hand(); };
    if (!mutex_.AwaitWithTimeout(absl::Condition(&free), kTakeOverTimeout)) {
      outcome.set_text("the handover is still under way here; ask again");
      return outcome;
    }
  }
  std::vector<std::string> unreadable;
  for (const HandoverEntry& entry : HandoverRecord::ReadAll(options_.record_folder, &unreadable)) {
    if (entry.role != HandoverRole::kTarget || entry.session != session || entry.guest != guest) {
      continue;
    }
    if (entry.phase == HandoverPhase::kRunning) {
      outcome.set_value(wire::Outcome::RUNNING);
      outcome.set_text("it runs here");
    } else if (entry.phase == HandoverPhase::kToldToRun) {
      // Its source keeps the only other copy until this is certain. Recovery runs it.
      outcome.set_text(
          "it was told to run here, and whether it does is not certain yet; see presync status "
          "there");
    } else if (entry.phase == HandoverPhase::kNeverRan) {
      outcome.set_value(wire::Outcome::NEVER_RAN);
      outcome.set_text("it never ran here");
    } else if (absl::Status s = host_->EndOrphan(entry.detail); !s.ok()) {
      outcome.set_text(std::string(s.message()));
    } else {
      // Nobody told it to run, and now nobody can.
      absl::StatusOr<HandoverRecord> record = HandoverRecord::Open(options_.record_folder, entry);
      if (record.ok() && record->Append(HandoverPhase::kNeverRan).ok()) {
        outcome.set_value(wire::Outcome::NEVER_RAN);
        outcome.set_text("it never ran here");
      } else {
        outcome.set_text("this host can't write its handover record");
      }
    }
    return outcome;
  }
  outcome.set_text("this host has no record of that session");
  return outcome;
}

}  // namespace presync
