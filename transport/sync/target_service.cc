#include "transport/sync/target_service.h"

#include <fcntl.h>
#include <sys/socket.h>

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "transport/clock.h"
#include "transport/sync/conversation.h"
#include "transport/sync/handover_record.h"
#include "transport/sync/target_session.h"
#include "transport/tcp/socket.h"

namespace presync {
namespace {

// How often the acceptor looks for expired sessions and ended threads.
constexpr absl::Duration kSweepEvery = absl::Milliseconds(200);
// When no connection can be taken, for want of descriptors: how long until the next try.
constexpr absl::Duration kAcceptRest = absl::Milliseconds(100);
// Newcomers that were dropped for others take a moment to end: while more than so many have not, no
// connection is taken.
constexpr size_t kMostDropped = 32;

}  // namespace

std::unique_ptr<TargetService> TargetService::Start(UniqueFd listener, TargetHost* host,
                                                    TargetServiceOptions options) {
  std::unique_ptr<TargetService> service(
      new TargetService(std::move(listener), host, std::move(options)));
  service->TakeKept();
  service->acceptor_ = std::thread([raw = service.get()] { raw->AcceptLoop(); });
  return service;
}

TargetService::TargetService(UniqueFd listener, TargetHost* host, TargetServiceOptions options)
    : listener_(std::move(listener)),
      host_(host),
      options_(std::move(options)),
      refusals_([this](const std::string& line) { Log(true, line); }),
      state_budget_(options_.state),
      newcomers_(options_.newcomers) {}

TargetService::~TargetService() {
  ending_ = true;
  acceptor_.join();
  CloseConnections();
  std::list<Client> clients;
  {
    MutexLock lock(&mutex_);
    clients.swap(clients_);
  }
  for (Client& client : clients) client.thread.join();
  MutexLock lock(&mutex_);
  for (TargetSlot& slot : slots_) {
    if (slot.place != nullptr && slot.content_kept && slot.noted) slot.place->Leave();
  }
}

void TargetService::CloseConnections() {
  MutexLock lock(&mutex_);
  for (TargetSlot& slot : slots_) {
    if (slot.channel != nullptr) slot.channel->Shutdown();
  }
}

void TargetService::AcceptLoop() {
  absl::Time next_sweep = MonotonicNow();
  while (!ending_) {
    if (MonotonicNow() >= next_sweep) {
      Sweep();
      next_sweep = MonotonicNow() + kSweepEvery;
    }
    absl::StatusOr<UniqueFd> accepted = Accept(listener_.get(), MonotonicNow() + kSweepEvery);
    if (accepted.ok()) {
      AwaitDropped();
      std::string peer = PeerName(accepted->get());
      Adopt(*std::move(accepted), std::move(peer));
    } else if (!absl::IsDeadlineExceeded(accepted.status())) {
      refusals_.Refuse("connections", std::string(accepted.status().message()), MonotonicNow());
      absl::SleepFor(kAcceptRest);
    }
  }
}

size_t TargetService::CountDropped() const {
  return static_cast<size_t>(std::count_if(clients_.begin(), clients_.end(),
                                           [](const Client& client) { return client.dropped; }));
}

void TargetService::AwaitDropped() {
  while (!ending_) {
    JoinEnded();  // or those of the last moments would count as open
    {
      MutexLock lock(&mutex_);
      if (CountDropped() <= kMostDropped) return;
    }
    absl::SleepFor(absl::Milliseconds(1));
  }
}

absl::Status TargetService::MakeRoom(const std::string& address) {
  if (const auto id = newcomers_.RoomFor(address); id.has_value()) Drop(*id);
  if (clients_.size() - CountDropped() >= options_.max_connections) {
    if (const auto id = newcomers_.MakeRoom(); id.has_value()) Drop(*id);
  }
  if (clients_.size() - CountDropped() < options_.max_connections) return absl::OkStatus();
  return absl::ResourceExhaustedError("as many connections as may be are open");
}

void TargetService::Drop(Newcomers::Id id) {
  newcomers_.Leave(id);
  for (Client& client : clients_) {
    if (client.id != id) continue;
    client.dropped = true;
    ::shutdown(client.handle.get(), SHUT_RDWR);  // its thread wakes, and ends it
  }
}

bool TargetService::LeaveNewcomers(Client* client, bool known) {
  MutexLock lock(&mutex_);
  newcomers_.Leave(client->id);
  if (known) newcomers_.Know(client->address);
  client->handle.reset();
  return client->dropped;
}

void TargetService::Adopt(UniqueFd socket, std::string peer) {
  const std::string address = PeerAddress(socket.get());
  absl::Status room;
  {
    MutexLock lock(&mutex_);
    room = MakeRoom(address);
    if (room.ok()) {
      Client& client = clients_.emplace_back();
      client.address = address;
      client.id = ++last_id_;
      client.handle.reset(::fcntl(socket.get(), F_DUPFD_CLOEXEC, 0));
      newcomers_.Enter(client.id, address);
      client.thread = std::thread(
          [this, &client, peer = std::move(peer), socket = std::move(socket)]() mutable {
            Serve(&client, std::move(socket), peer);
            client.done = true;
          });
      return;
    }
  }
  refusals_.Refuse(address, std::string(room.message()), MonotonicNow());
}

void TargetService::Serve(Client* client, UniqueFd socket, const std::string& peer) {
  absl::StatusOr<Admitted> admitted =
      Admit(std::move(socket), options_.admission, MonotonicNow() + options_.preamble_timeout);
  const std::string name = admitted.ok() ? admitted->connection.peer_name() : "";
  const bool dropped = LeaveNewcomers(client, !name.empty());
  absl::Status status = admitted.status();
  if (dropped) {
    status = absl::ResourceExhaustedError(
        "it did not say who it is while others came; too many new connections at a time");
  } else if (status.ok() && admitted->preamble.kind == Preamble::Kind::kData) {
    status = DeliverStream(admitted->preamble, std::move(admitted->connection));
  }
  if (!status.ok()) {
    const std::string who = dropped ? WhereaboutsOf(client->address).network : client->address;
    refusals_.Refuse(who, std::string(status.message()), MonotonicNow());
    return;
  }
  if (admitted->preamble.kind != Preamble::Kind::kControl) return;
  ControlChannel channel(std::move(admitted->connection),
                         name.empty() ? peer : absl::StrCat(peer, " (", name, ")"));
  RunTargetConversation(this, &channel);
}

void TargetService::LogRefusal(const ControlChannel& channel, const absl::Status& why) {
  const std::string name = channel.peer_name();
  const std::string address = AddressOf(channel.peer());
  refusals_.Refuse(name.empty() ? address : absl::StrCat(address, " (", name, ")"),
                   std::string(why.message()), MonotonicNow());
}

const PeerRules* TargetService::RulesOf(const ControlChannel& channel) const {
  const std::string name = channel.peer_name();
  return name.empty() ? nullptr : FindRules(options_.peers, name);
}

absl::Status TargetService::CheckPeer(const ControlChannel& channel) const {
  const std::string name = channel.peer_name();
  if (name.empty() || FindRules(options_.peers, name) != nullptr) return absl::OkStatus();
  return absl::PermissionDeniedError(
      absl::StrCat(name,
                   ", as its certificate names it, may not keep guests in sync with this "
                   "host; to let it, add [peer.\"",
                   name, "\"] to this host's presyncd.toml and restart presyncd"));
}

SessionToken TargetService::ExpectStreams(uint32_t count, const ControlChannel& channel) {
  const SessionToken token = RandomId();
  MutexLock lock(&mutex_);
  rendezvous_[token].streams.resize(count);
  rendezvous_[token].peer_name = channel.peer_name();
  return token;
}

absl::Status TargetService::DeliverStream(const Preamble& preamble, Connection connection) {
  MutexLock lock(&mutex_);
  const auto it = rendezvous_.find(preamble.token);
  if (it == rendezvous_.end() || it->second.peer_name != connection.peer_name() ||
      preamble.stream >= it->second.streams.size() || it->second.streams[preamble.stream].valid()) {
    return absl::PermissionDeniedError(
        "a data connection whose token or stream number is not expected from this peer");
  }
  it->second.streams[preamble.stream] = std::move(connection);
  ++it->second.arrived;
  return absl::OkStatus();
}

absl::StatusOr<std::vector<Connection>> TargetService::TakeStreams(const SessionToken& token,
                                                                   absl::Time deadline) {
  MutexLock lock(&mutex_);
  StreamRendezvous& rendezvous = rendezvous_[token];
  const auto complete = [&rendezvous, this] {
    return rendezvous.arrived == rendezvous.streams.size() || rendezvous.forgotten || ending_;
  };
  mutex_.AwaitWithDeadline(complete, deadline);
  const bool all = rendezvous.arrived == rendezvous.streams.size() && !ending_;
  std::vector<Connection> streams = std::move(rendezvous.streams);
  rendezvous_.erase(token);
  if (!all) return absl::DeadlineExceededError("the source did not open its data connections");
  return streams;
}

void TargetService::ForgetStreams(const SessionToken& token) {
  MutexLock lock(&mutex_);
  const auto it = rendezvous_.find(token);
  if (it != rendezvous_.end()) it->second.forgotten = true;
}

void TargetService::JoinEnded() {
  std::list<Client> ended;
  {
    MutexLock lock(&mutex_);
    for (auto it = clients_.begin(); it != clients_.end();) {
      const auto next = std::next(it);
      if (it->done) ended.splice(ended.end(), clients_, it);
      it = next;
    }
  }
  for (Client& client : ended) client.thread.join();
}

void TargetService::Sweep() {
  std::vector<TargetSlot*> expired;
  {
    MutexLock lock(&mutex_);
    for (TargetSlot& slot : slots_) {
      if (slot.busy || MonotonicNow() - slot.lost_at <= options_.keep_lost_session) continue;
      slot.busy = slot.closing = true;  // nobody takes it up any more
      expired.push_back(&slot);
    }
  }
  JoinEnded();
  refusals_.Flush(MonotonicNow());
  for (TargetSlot* slot : expired) {
    Log(true, absl::StrCat(slot->guest, ": its source did not come back; its memory is given up"));
    EndSlot(slot);
  }
}

std::vector<TargetStatus> TargetService::status() const {
  std::vector<TargetStatus> all;
  MutexLock lock(&mutex_);
  for (const TargetSlot& slot : slots_) {
    TargetStatus status = {.guest = slot.guest,
                           .session = IdToHex(slot.session),
                           .peer = slot.peer,
                           .peer_name = slot.peer_name,
                           .state = slot.state};
    all.push_back(std::move(status));
  }
  return all;
}

wire::Outcome TargetService::Outcome(const SessionId& session, const std::string& guest,
                                     const std::string& peer_name, bool end_it) {
  wire::Outcome outcome;
  {
    // While a conversation still has the guest in hand its fate is open: end it, then read the
    // record.
    MutexLock lock(&mutex_);
    if (IsOthers(session, peer_name)) {
      outcome.set_text("that session was opened by another peer");
      return outcome;
    }
    const auto in_hand = [&] {
      mutex_.AssertHeld();
      return std::any_of(slots_.begin(), slots_.end(), [&](const TargetSlot& slot) {
        return slot.session == session && slot.busy;
      });
    };
    for (TargetSlot& slot : slots_) {
      if (slot.session == session && slot.busy && slot.channel != nullptr) slot.channel->Shutdown();
    }
    const auto free = [&] { return !in_hand(); };
    if (!mutex_.AwaitWithTimeout(free, kTakeOverTimeout)) {
      outcome.set_text("the handover is still under way here; ask again");
      outcome.set_phase("under-way");
      return outcome;
    }
  }
  const GuestClaims::Claim claim = options_.claims->Take(guest, kTakeOverTimeout);
  if (!claim.held()) {
    outcome.set_text("its QEMU is being looked at here; ask again");
    outcome.set_phase("under-way");
    return outcome;
  }
  std::vector<std::string> unreadable;
  for (const HandoverEntry& entry : HandoverRecord::ReadAll(options_.record_folder, &unreadable)) {
    if (entry.role != HandoverRole::kTarget || entry.session != session || entry.guest != guest) {
      continue;
    }
    // Of a time before there were certificates: anybody who may come may ask.
    if (entry.peer_name.empty() || entry.peer_name == peer_name) return OutcomeOf(entry, end_it);
    outcome.set_text("that session was opened by another peer");
    return outcome;
  }
  outcome.set_text("this host has no record of that session");
  return outcome;
}

// Of a guest that is claimed.
wire::Outcome TargetService::OutcomeOf(const HandoverEntry& entry, bool end_it) {
  wire::Outcome outcome;
  outcome.set_phase(std::string(PhaseName(entry.phase)));
  if (entry.phase == HandoverPhase::kRunning) {
    outcome.set_value(wire::Outcome::RUNNING);
    outcome.set_text("it runs here, or ran here and went on from here");
  } else if (entry.phase == HandoverPhase::kToldToRun && !end_it) {
    // Its source keeps the only other copy until this is certain. Recovery runs it.
    outcome.set_text(
        "it was told to run here, and whether it does is not certain yet; see presync status "
        "there");
  } else if (entry.phase == HandoverPhase::kRanUntold) {
    outcome.set_text("somebody ran it here though nobody told it to; see presync status there");
  } else if (entry.phase == HandoverPhase::kNeverRan) {
    outcome.set_value(wire::Outcome::NEVER_RAN);
    outcome.set_text("it never ran here");
  } else if (absl::Status s = EndForGood(entry); !s.ok()) {
    outcome.set_text(std::string(s.message()));
  } else {
    outcome.set_value(wire::Outcome::NEVER_RAN);
    outcome.set_text("it never ran here");
  }
  return outcome;
}

// Nobody told it to run, or a person takes the order back; and from now on nobody can.
absl::Status TargetService::EndForGood(const HandoverEntry& entry) {
  const absl::Status ended = host_->EndOrphan(entry);
  const bool runs_untold = absl::IsAlreadyExists(ended) && entry.phase == HandoverPhase::kWaiting;
  if (!ended.ok() && !runs_untold) return ended;
  absl::StatusOr<HandoverRecord> record = HandoverRecord::Reserve(options_.record_folder, entry);
  if (!record.ok()) return record.status();
  if (runs_untold) {
    record->Append(HandoverPhase::kRanUntold).IgnoreError();
    return ended;
  }
  if (entry.phase == HandoverPhase::kToldToRun) {
    if (absl::Status s = record->Append(HandoverPhase::kWaiting); !s.ok()) return s;
    Log(true, absl::StrCat(entry.guest, ": a person at ", entry.peer,
                           " says that it goes on there: ended here"));
  }
  return record->Append(HandoverPhase::kNeverRan);
}

}  // namespace presync
