#include "tests/faults/network.h"

#include <errno.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <utility>

#include "absl/strings/str_cat.h"
#include "predictor/check.h"
#include "transport/clock.h"
#include "transport/wire/control.pb.h"

namespace presync {
namespace {

constexpr absl::Duration kLook = absl::Milliseconds(2);

absl::Status Gone() { return absl::UnavailableError("the network is down, as scripted"); }

// Reads exactly `size` bytes; false when the other end is gone or this connection is over.
bool ReadAll(int fd, std::string* bytes, size_t size, const std::atomic<bool>& done) {
  bytes->resize(size);
  size_t have = 0;
  while (have < size) {
    if (done) return false;
    const ssize_t n = ::recv(fd, bytes->data() + have, size - have, MSG_DONTWAIT);
    if (n > 0) {
      have += static_cast<size_t>(n);
    } else if (n == 0 || (errno != EAGAIN && errno != EINTR)) {
      return false;
    } else {
      pollfd p = {.fd = fd, .events = POLLIN, .revents = 0};
      ::poll(&p, 1, 2);
    }
  }
  return true;
}

bool WriteAll(int fd, absl::string_view bytes, const std::atomic<bool>& done) {
  while (!bytes.empty()) {
    if (done) return false;
    const ssize_t n = ::send(fd, bytes.data(), bytes.size(), MSG_NOSIGNAL | MSG_DONTWAIT);
    if (n > 0) {
      bytes.remove_prefix(static_cast<size_t>(n));
    } else if (errno == EAGAIN) {
      pollfd p = {.fd = fd, .events = POLLOUT, .revents = 0};
      ::poll(&p, 1, 2);
    } else if (errno != EINTR) {
      return false;
    }
  }
  return true;
}

// By number: protobuf's lite messages can't name themselves.
constexpr std::array<const char*, 26> kMessages = {
    "empty",         "hello",        "open_session",   "session_opened", "link_ready",
    "refused",       "ping",         "pong",           "begin_handover", "handover_ready",
    "state_chunk",   "hash_request", "hash_reply",     "load",           "loaded",
    "run",           "running",      "abort_handover", "query_outcome",  "outcome",
    "close_session", "open_link",    "link_offer",     "link_refused",   "close_link",
    "link_closed"};

std::string MessageName(const std::string& body) {
  wire::ControlMessage message;
  if (!message.ParseFromString(body)) return "unreadable";
  const auto number = static_cast<size_t>(message.body_case());
  return number < kMessages.size() ? kMessages[number] : "newer";
}

}  // namespace

// Page links. -------------------------------------------------------------------------------------

// Dies with the network's epoch, and with the life that holds it.
class Network::SourceEnd final : public SourceLink {
 public:
  SourceEnd(Network* network, Life* life, std::unique_ptr<FakeSourceLink> link)
      : network_(network), life_(life), epoch_(network->epoch_), link_(std::move(link)) {}
  std::string_view name() const override { return "fake"; }
  absl::StatusOr<size_t> Post(absl::Span<const PageWrite> writes) override {
    absl::StatusOr<size_t> posted = size_t{0};
    if (absl::Status s = Alive(); !s.ok()) return s;
    if (network_->silent_ && !writes.empty()) return size_t{0};
    const absl::Status acted = life_->Act([&] { posted = link_->Post(writes); });
    return acted.ok() ? posted : absl::StatusOr<size_t>(acted);
  }
  absl::StatusOr<CommitId> PostCommit() override {
    if (absl::Status s = Alive(); !s.ok()) return s;
    absl::StatusOr<CommitId> commit = CommitId{0};
    const absl::Status acted = life_->Act([&] { commit = link_->PostCommit(); });
    return acted.ok() ? commit : absl::StatusOr<CommitId>(acted);
  }
  absl::Status Poll(LinkEvents* events) override {
    if (absl::Status s = Alive(); !s.ok()) return s;
    if (network_->silent_) return absl::OkStatus();
    absl::Status polled;
    const absl::Status acted = life_->Act([&] { polled = link_->Poll(events); });
    return acted.ok() ? polled : acted;
  }
  absl::Status Wait(absl::Time deadline) override {
    if (network_->silent_) {
      absl::SleepFor(std::min(kLook, deadline - MonotonicNow()));
      return absl::OkStatus();
    }
    return link_ == nullptr ? absl::OkStatus() : link_->Wait(deadline);
  }
  LinkStats stats() const override { return link_ == nullptr ? LinkStats() : link_->stats(); }
  void SetPacing(uint64_t bytes_per_s) override {
    if (link_ != nullptr) link_->SetPacing(bytes_per_s);
  }

 private:
  // A dead network delivers what it likes of what was under way, and then nothing.
  absl::Status Alive() {
    if (link_ != nullptr && epoch_ == network_->epoch_ && !network_->down_) return absl::OkStatus();
    link_.reset();
    return Gone();
  }

  Network* const network_;
  Life* const life_;
  const uint64_t epoch_;
  std::unique_ptr<FakeSourceLink> link_;
};

class Network::TargetEnd final : public TargetLink {
 public:
  TargetEnd(Network* network, Life* life, std::unique_ptr<FakeTargetLink> link)
      : network_(network), life_(life), epoch_(network->epoch_), link_(std::move(link)) {}
  std::string_view name() const override { return "fake"; }
  absl::Status health() const override {
    return epoch_ == network_->epoch_ && !life_->crashed() ? link_->health() : Gone();
  }
  void Close() override { link_->Close(); }

 private:
  Network* const network_;
  Life* const life_;
  const uint64_t epoch_;
  const std::unique_ptr<FakeTargetLink> link_;
};

MakeSourceLink Network::SourceLinks(const GuestMemory* memory, Life* life) {
  return [this, memory, life](const SessionId& token, absl::Time deadline) {
    return MeetAtSource(token, memory, life, deadline);
  };
}

MakeTargetLink Network::TargetLinks(Life* life) {
  return [this, life](const SessionId& token, const GuestMemory* memory, absl::Time deadline) {
    return MeetAtTarget(token, memory, life, deadline);
  };
}

absl::StatusOr<std::unique_ptr<SourceLink>> Network::MeetAtSource(const SessionId& token,
                                                                  const GuestMemory* memory,
                                                                  Life* life, absl::Time deadline) {
  MutexLock lock(&mutex_);
  const uint64_t epoch = epoch_;
  while (meetings_[token].target_memory == nullptr) {
    if (MonotonicNow() >= deadline || epoch != epoch_ || down_ || life->crashed()) {
      meetings_[token].over = true;
      return Gone();
    }
    mutex_.AwaitWithTimeout([] { return false; }, kLook);
  }
  FakeLinkOptions options = {.seed = random_(),
                             .faults = link_faults_,
                             .latency = absl::Microseconds(20),
                             .jitter = absl::Microseconds(random_() % 200),
                             .short_post_probability = 0.1};
  absl::StatusOr<FakeLink> link =
      FakeLink::Create(memory, meetings_[token].target_memory, std::move(options));
  if (!link.ok()) return link.status();
  meetings_[token].target_end =
      std::make_unique<TargetEnd>(this, target_life_, std::move(link->target));
  return std::make_unique<SourceEnd>(this, life, std::move(link->source));
}

absl::StatusOr<std::unique_ptr<TargetLink>> Network::MeetAtTarget(const SessionId& token,
                                                                  const GuestMemory* memory,
                                                                  Life* life, absl::Time deadline) {
  MutexLock lock(&mutex_);
  const uint64_t epoch = epoch_;
  meetings_[token].target_memory = memory;
  while (meetings_[token].target_end == nullptr) {
    if (MonotonicNow() >= deadline || epoch != epoch_ || down_ || life->crashed() ||
        meetings_[token].over) {
      meetings_.erase(token);
      return Gone();
    }
    mutex_.AwaitWithTimeout([] { return false; }, kLook);
  }
  std::unique_ptr<TargetLink> end = std::move(meetings_[token].target_end);
  meetings_.erase(token);
  return end;
}

// Control connections. ----------------------------------------------------------------------------

class NetworkDialer final : public Dialer {
 public:
  NetworkDialer(Network* network, Life* life) : network_(network), life_(life) {}
  absl::StatusOr<presync::Connection> Dial(const Preamble& preamble, absl::Time) override {
    absl::StatusOr<UniqueFd> socket = network_->Connect(life_, preamble);
    if (!socket.ok()) return socket.status();
    return presync::Connection(*std::move(socket));
  }
  const std::string& peer() const override { return peer_; }

 private:
  Network* const network_;
  Life* const life_;
  const std::string peer_ = "the-target";
};

Network::Network(uint64_t seed, FrameHook hook) : hook_(std::move(hook)), random_(seed) {}

Network::~Network() {
  Reset();
  std::list<Connection> connections;
  {
    MutexLock lock(&mutex_);
    connections.swap(connections_);
  }
  for (Connection& connection : connections) connection.thread.join();
}

void Network::SetTarget(TargetService* service, Life* life) {
  MutexLock lock(&mutex_);
  service_ = service;
  target_life_ = life;
}

std::unique_ptr<Dialer> Network::MakeDialer(Life* life) {
  return std::make_unique<NetworkDialer>(this, life);
}

void Network::Reset() {
  ++epoch_;
  MutexLock lock(&mutex_);
  for (Connection& connection : connections_) connection.done = true;
}

void Network::SetDown(bool down) {
  down_ = down;
  if (down) Reset();
}

void Network::SetLinkFaults(const FakeLinkFaults& faults) {
  MutexLock lock(&mutex_);
  link_faults_ = faults;
}

absl::StatusOr<UniqueFd> Network::Connect(Life* source_life, const Preamble& preamble) {
  if (down_ || source_life->crashed()) return Gone();
  int near[2], far[2];
  PRESYNC_CHECK(::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, near) == 0);
  PRESYNC_CHECK(::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, far) == 0);
  UniqueFd ours(near[0]), theirs(far[0]);
  MutexLock lock(&mutex_);
  Connection& connection = connections_.emplace_back();
  connection.source.reset(near[1]);
  connection.target.reset(far[1]);
  connection.source_life = source_life;
  connection.target_life = target_life_;
  if (service_ == nullptr || target_life_->crashed()) {
    connections_.pop_back();
    return absl::UnavailableError("connect: nobody listens at the target");
  }
  const auto bytes = EncodePreamble(preamble);
  PRESYNC_CHECK(::send(far[1], bytes.data(), bytes.size(), MSG_NOSIGNAL) ==
                static_cast<ssize_t>(bytes.size()));
  service_->Adopt(std::move(theirs), "the-source");
  connection.thread = std::thread([this, raw = &connection] { Carry(raw); });
  return ours;
}

void Network::Carry(Connection* connection) {
  const auto over = [&] {
    return connection->done || connection->source_life->crashed() ||
           connection->target_life->crashed();
  };
  bool open = true;
  while (open && !over()) {
    pollfd p[2] = {{.fd = connection->source.get(), .events = POLLIN, .revents = 0},
                   {.fd = connection->target.get(), .events = POLLIN, .revents = 0}};
    ::poll(p, 2, 2);
    if (silent_) {
      absl::SleepFor(kLook);
      continue;
    }
    if (p[0].revents != 0) open = CarryOne(connection, /*from_source=*/true);
    if (open && p[1].revents != 0) open = CarryOne(connection, /*from_source=*/false);
  }
  connection->source.reset();
  connection->target.reset();
  connection->done = true;
}

// One frame; false: the connection is over.
bool Network::CarryOne(Connection* connection, bool from_source) {
  const int from = from_source ? connection->source.get() : connection->target.get();
  const int to = from_source ? connection->target.get() : connection->source.get();
  Life* const sender = from_source ? connection->source_life : connection->target_life;
  Life* const receiver = from_source ? connection->target_life : connection->source_life;
  std::string head, body;
  if (!ReadAll(from, &head, 4, connection->done)) return false;
  const uint32_t size = static_cast<uint8_t>(head[0]) | static_cast<uint8_t>(head[1]) << 8 |
                        static_cast<uint8_t>(head[2]) << 16 |
                        static_cast<uint32_t>(static_cast<uint8_t>(head[3])) << 24;
  if (!ReadAll(from, &body, size, connection->done)) return false;
  const std::string name = MessageName(body);
  const FrameFault fault = hook_(name, /*before=*/true);
  std::string frame = head + body;
  {
    MutexLock lock(&mutex_);
    if (fault == FrameFault::kTruncate) frame.resize(1 + random_() % (frame.size() - 1));
    if (fault == FrameFault::kDuplicate) frame += frame;
    if (fault == FrameFault::kCorrupt) {
      const size_t bound = std::min<size_t>(frame.size(), 64);
      frame[random_() % bound] ^= static_cast<char>(1 << random_() % 8);
    }
  }
  if (fault == FrameFault::kDelay) absl::SleepFor(absl::Milliseconds(60));
  bool passed = false;
  sender->AwaitRunning();
  // What has left a presyncd that crashes now may arrive all the same; what has not may not.
  const absl::Status sent = sender->Act([&] {
    if (!receiver->crashed()) passed = WriteAll(to, frame, connection->done);
  });
  hook_(name, /*before=*/false);
  return sent.ok() && passed && fault != FrameFault::kTruncate;
}

}  // namespace presync
