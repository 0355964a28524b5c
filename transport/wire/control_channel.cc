#include "transport/wire/control_channel.h"

#include <errno.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/socket.h>

#include <algorithm>
#include <cstring>

#include "absl/strings/str_cat.h"

namespace presync {
namespace {

// Ok when `fd` is ready for `events`; DEADLINE_EXCEEDED otherwise.
absl::Status AwaitReady(int fd, short events, absl::Time deadline) {
  while (true) {
    const absl::Duration left = deadline - absl::Now();
    const int64_t ms = std::clamp<int64_t>(
        absl::ToInt64Milliseconds(absl::Ceil(left, absl::Milliseconds(1))), 0, 1 << 30);
    pollfd p = {.fd = fd, .events = events, .revents = 0};
    const int n = ::poll(&p, 1, static_cast<int>(ms));
    if (n > 0) return absl::OkStatus();
    if (n == 0) return absl::DeadlineExceededError("timed out");
    if (errno != EINTR) return absl::ErrnoToStatus(errno, "poll");
  }
}

uint32_t LoadLength(const char* p) {
  const auto* b = reinterpret_cast<const uint8_t*>(p);
  return b[0] | b[1] << 8 | b[2] << 16 | static_cast<uint32_t>(b[3]) << 24;
}

}  // namespace

ControlChannel::ControlChannel(UniqueFd socket, std::string peer)
    : socket_(std::move(socket)), peer_(std::move(peer)) {
  // A handover is a chain of short messages: none may wait for an acknowledgement of the one
  // before.
  const int on = 1;
  ::setsockopt(socket_.get(), IPPROTO_TCP, TCP_NODELAY, &on, sizeof(on));
}

ControlChannel::~ControlChannel() = default;

std::string ControlChannel::local_address() const {
  sockaddr_storage address = {};
  socklen_t length = sizeof(address);
  char host[NI_MAXHOST];
  auto* any = reinterpret_cast<sockaddr*>(&address);
  if (::getsockname(socket_.get(), any, &length) != 0) return "";
  if (address.ss_family != AF_INET && address.ss_family != AF_INET6) return "";
  if (::getnameinfo(any, length, host, sizeof(host), nullptr, 0, NI_NUMERICHOST) != 0) return "";
  const std::string text = host;
  // A socket that listens for both takes IPv4 in this form.
  const std::string mapped = "::ffff:";
  return text.rfind(mapped, 0) == 0 ? text.substr(mapped.size()) : text;
}

void ControlChannel::Shutdown() { ::shutdown(socket_.get(), SHUT_RDWR); }

absl::Status ControlChannel::Send(const wire::ControlMessage& message, absl::Time deadline) {
  std::string frame(4, '\0');
  if (!message.AppendToString(&frame) || frame.size() - 4 > kMaxControlFrameBytes) {
    return absl::InternalError("a control message is too long to send");
  }
  const uint32_t length = static_cast<uint32_t>(frame.size() - 4);
  for (int i = 0; i < 4; ++i) frame[i] = static_cast<char>(length >> (8 * i));

  absl::MutexLock lock(&send_mutex_);
  if (!send_status_.ok()) return send_status_;
  size_t sent = 0;
  while (sent < frame.size()) {
    const ssize_t n = ::send(socket_.get(), frame.data() + sent, frame.size() - sent,
                             MSG_NOSIGNAL | MSG_DONTWAIT);
    if (n > 0) {
      sent += static_cast<size_t>(n);
      continue;
    }
    if (n < 0 && errno == EINTR) continue;
    if (n < 0 && (errno == EAGAIN || errno == EWOULDBLOCK)) {
      if (AwaitReady(socket_.get(), POLLOUT, deadline).ok()) continue;
      send_status_ =
          absl::DeadlineExceededError(absl::StrCat(peer_, " does not read its control connection"));
      return send_status_;
    }
    send_status_ = absl::UnavailableError(
        absl::StrCat("the control connection to ", peer_, " is gone: ", std::strerror(errno)));
    return send_status_;
  }
  return absl::OkStatus();
}

absl::Status ControlChannel::FillTo(size_t bytes, absl::Time deadline) {
  char buffer[64 << 10];
  while (received_.size() < bytes) {
    // Never beyond the frame: what follows it may belong to somebody else's protocol.
    const size_t want = std::min(sizeof(buffer), bytes - received_.size());
    const ssize_t n = ::recv(socket_.get(), buffer, want, MSG_DONTWAIT);
    if (n > 0) {
      received_.append(buffer, static_cast<size_t>(n));
    } else if (n == 0) {
      return absl::UnavailableError(absl::StrCat(peer_, " closed the control connection"));
    } else if (errno == EAGAIN || errno == EWOULDBLOCK) {
      if (absl::Status s = AwaitReady(socket_.get(), POLLIN, deadline); !s.ok()) return s;
    } else if (errno != EINTR) {
      return absl::UnavailableError(
          absl::StrCat("the control connection to ", peer_, " is gone: ", std::strerror(errno)));
    }
  }
  return absl::OkStatus();
}

absl::StatusOr<wire::ControlMessage> ControlChannel::Receive(absl::Time deadline) {
  if (absl::Status s = FillTo(4, deadline); !s.ok()) return s;
  const uint32_t length = LoadLength(received_.data());
  if (length > kMaxControlFrameBytes) {
    return absl::InvalidArgumentError(absl::StrCat(peer_, " sent a control frame of ", length,
                                                   " bytes; the limit is ", kMaxControlFrameBytes));
  }
  if (absl::Status s = FillTo(4 + length, deadline); !s.ok()) return s;
  wire::ControlMessage message;
  const bool parsed = message.ParseFromArray(received_.data() + 4, static_cast<int>(length));
  received_.clear();
  if (!parsed || message.body_case() == wire::ControlMessage::BODY_NOT_SET) {
    return absl::InvalidArgumentError(
        absl::StrCat(peer_, " sent a control message that this version can't read"));
  }
  return message;
}

}  // namespace presync
