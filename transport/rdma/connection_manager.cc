#include "transport/rdma/connection_manager.h"

#include <errno.h>
#include <fcntl.h>
#include <netdb.h>
#include <netinet/in.h>
#include <poll.h>
#include <sys/socket.h>

#include <algorithm>
#include <cstring>

#include "absl/cleanup/cleanup.h"
#include "absl/strings/str_cat.h"
#include "transport/clock.h"

namespace presync {
namespace {

absl::StatusOr<sockaddr_storage> ParseAddress(const std::string& address, uint16_t port) {
  addrinfo hints = {};
  hints.ai_flags = AI_NUMERICHOST | AI_NUMERICSERV;
  hints.ai_socktype = SOCK_STREAM;
  addrinfo* found = nullptr;
  if (getaddrinfo(address.c_str(), std::to_string(port).c_str(), &hints, &found) != 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("rdma link: '", address, "' is no numeric address"));
  }
  const auto release = absl::MakeCleanup([found] { freeaddrinfo(found); });
  sockaddr_storage out = {};
  std::memcpy(&out, found->ai_addr, found->ai_addrlen);
  return out;
}

bool IsLoopback(const sockaddr_storage& address) {
  if (address.ss_family == AF_INET) {
    const auto& in = reinterpret_cast<const sockaddr_in&>(address);
    return ntohl(in.sin_addr.s_addr) >> 24 == 127;
  }
  return IN6_IS_ADDR_LOOPBACK(&reinterpret_cast<const sockaddr_in6&>(address).sin6_addr);
}

int MillisUntil(absl::Time deadline) {
  const absl::Duration left = absl::Ceil(deadline - MonotonicNow(), absl::Milliseconds(1));
  return static_cast<int>(std::clamp<int64_t>(absl::ToInt64Milliseconds(left), 0, 1 << 30));
}

// Waits for the one event that `id` is due.
absl::Status Expect(const CmChannel& channel, const CmId& id, rdma_cm_event_type wanted,
                    const std::string& what, absl::Time deadline) {
  while (true) {
    absl::StatusOr<CmEvent> event = channel.Next(deadline);
    if (absl::IsDeadlineExceeded(event.status())) {
      return absl::DeadlineExceededError(absl::StrCat("rdma link: ", what, ": no answer in time"));
    }
    if (!event.ok()) return event.status();
    if (event->id != id.get()) continue;
    if (event->type == wanted) return absl::OkStatus();
    const std::string text = absl::StrCat("rdma link: ", what, ": ", rdma_event_str(event->type),
                                          " (status ", event->status, ")");
    if (event->type == RDMA_CM_EVENT_REJECTED) {
      return absl::PermissionDeniedError(
          absl::StrCat(text, ": the target takes no such queue pair"));
    }
    return absl::UnavailableError(text);
  }
}

// The devices' unit: 4.096 us times a power of 2.
uint8_t AckTimeoutExponent(absl::Duration timeout) {
  uint8_t exponent = 1;
  while (exponent < 31 && absl::Nanoseconds(4096) * (1 << exponent) < timeout) ++exponent;
  return exponent;
}

constexpr uint8_t kRetries = 7;        // the most there are: 3 bits
constexpr uint8_t kRetryForReady = 7;  // for ever: a receiver that is not ready is only slow
constexpr uint8_t kPendingReads = 1;   // we read nothing, but some devices refuse 0
constexpr int kListenBacklog = 64;

}  // namespace

absl::StatusOr<std::unique_ptr<CmChannel>> CmChannel::Open() {
  rdma_event_channel* channel = rdma_create_event_channel();
  if (channel == nullptr) {
    return absl::UnimplementedError(
        absl::StrCat("rdma link: /dev/infiniband/rdma_cm can't be used (", std::strerror(errno),
                     "); modprobe rdma_ucm, and run presyncd as a user who may open it"));
  }
  ::fcntl(channel->fd, F_SETFL, ::fcntl(channel->fd, F_GETFL) | O_NONBLOCK);
  return std::unique_ptr<CmChannel>(new CmChannel(channel));
}

CmChannel::~CmChannel() { rdma_destroy_event_channel(channel_); }

absl::StatusOr<CmId> CmChannel::MakeId() const {
  rdma_cm_id* id = nullptr;
  if (rdma_create_id(channel_, &id, nullptr, RDMA_PS_TCP) != 0) {
    return VerbsError("make", "a connection", errno);
  }
  return CmId(id);
}

absl::StatusOr<CmEvent> CmChannel::Next(absl::Time deadline) const {
  while (true) {
    rdma_cm_event* taken = nullptr;
    if (rdma_get_cm_event(channel_, &taken) == 0) {
      CmEvent event = {.type = taken->event,
                       .id = taken->id,
                       .listener = taken->listen_id,
                       .status = taken->status};
      if (taken->event == RDMA_CM_EVENT_CONNECT_REQUEST &&
          taken->param.conn.private_data != nullptr) {
        event.data_bytes = std::min<size_t>(taken->param.conn.private_data_len, event.data.size());
        std::memcpy(event.data.data(), taken->param.conn.private_data, event.data_bytes);
      }
      rdma_ack_cm_event(taken);
      return event;
    }
    if (errno != EAGAIN && errno != EINTR) return VerbsError("wait for", "connections", errno);
    const int ms = MillisUntil(deadline);
    pollfd p = {.fd = channel_->fd, .events = POLLIN, .revents = 0};
    if (ms == 0 || ::poll(&p, 1, ms) == 0) {
      if (MonotonicNow() >= deadline) return absl::DeadlineExceededError("no event");
    }
  }
}

absl::Status ListenAt(const CmId& id, const std::string& address) {
  absl::StatusOr<sockaddr_storage> at = ParseAddress(address, 0);
  if (!at.ok()) return at.status();
  // The kernel would bind it to some device; no other host reaches that.
  if (IsLoopback(*at)) {
    return absl::UnimplementedError(
        absl::StrCat(address,
                     " is on loopback, which is no RDMA device's: connect to an address "
                     "of one, or name them in rdma_addresses"));
  }
  if (rdma_bind_addr(id.get(), reinterpret_cast<sockaddr*>(&*at)) != 0 && errno != ENODEV &&
      errno != EADDRNOTAVAIL) {
    return VerbsError("bind to", address, errno);
  }
  if (id->verbs == nullptr) {
    return absl::UnimplementedError(absl::StrCat("no RDMA device of this host has the address ",
                                                 address, " (rdma link and ip address show them)"));
  }
  if (rdma_listen(id.get(), kListenBacklog) != 0) return VerbsError("listen at", address, errno);
  return absl::OkStatus();
}

absl::Status Resolve(const CmChannel& channel, const CmId& id, const std::string& address,
                     uint16_t port, absl::Duration path_timeout, absl::Time deadline) {
  absl::StatusOr<sockaddr_storage> to = ParseAddress(address, port);
  if (!to.ok()) return to.status();
  const std::string what = absl::StrCat("find the way to ", address, " port ", port);
  if (rdma_resolve_addr(id.get(), nullptr, reinterpret_cast<sockaddr*>(&*to),
                        MillisUntil(deadline)) != 0) {
    return VerbsError("find a device for", address, errno);
  }
  absl::Status status = Expect(channel, id, RDMA_CM_EVENT_ADDR_RESOLVED, what, deadline);
  if (!status.ok() || id->verbs == nullptr) {
    return absl::UnimplementedError(
        absl::StrCat("no RDMA device of this host reaches ", address, ": ",
                     status.ok() ? "the way there is no device's" : std::string(status.message())));
  }
  // Before the route, which takes it over. iWARP has TCP's timeouts and refuses.
  uint8_t exponent = AckTimeoutExponent(path_timeout / (kRetries + 1));
  rdma_set_option(id.get(), RDMA_OPTION_ID, RDMA_OPTION_ID_ACK_TIMEOUT, &exponent,
                  sizeof(exponent));
  if (rdma_resolve_route(id.get(), MillisUntil(deadline)) != 0) {
    return VerbsError("find the way to", address, errno);
  }
  return Expect(channel, id, RDMA_CM_EVENT_ROUTE_RESOLVED, what, deadline);
}

absl::Status ConnectId(const CmChannel& channel, const CmId& id, const ConnectData& data,
                       absl::Time deadline) {
  const auto bytes = EncodeConnectData(data);
  rdma_conn_param param = {};
  param.private_data = bytes.data();
  param.private_data_len = bytes.size();
  param.responder_resources = kPendingReads;
  param.initiator_depth = kPendingReads;
  param.flow_control = 1;
  param.retry_count = kRetries;
  param.rnr_retry_count = kRetryForReady;
  const std::string what = absl::StrCat("connect queue pair ", data.index);
  if (rdma_connect(id.get(), &param) != 0) return VerbsError("connect", "a queue pair", errno);
  return Expect(channel, id, RDMA_CM_EVENT_ESTABLISHED, what, deadline);
}

absl::Status AcceptId(const CmId& id) {
  rdma_conn_param param = {};
  param.responder_resources = kPendingReads;
  param.initiator_depth = kPendingReads;
  param.flow_control = 1;
  param.rnr_retry_count = kRetryForReady;
  if (rdma_accept(id.get(), &param) != 0) return VerbsError("accept", "a queue pair", errno);
  return absl::OkStatus();
}

}  // namespace presync
