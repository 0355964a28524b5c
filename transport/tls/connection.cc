#include "transport/tls/connection.h"

#include <errno.h>
#include <poll.h>
#include <sys/socket.h>

#include <algorithm>
#include <cstring>

#include "transport/clock.h"

namespace presync {
namespace {

// Of a plain socket's failure: nothing now, or gone.
absl::StatusOr<size_t> Failure(short wanted, short* events) {
  if (errno == EAGAIN || errno == EWOULDBLOCK || errno == EINTR) {
    *events = wanted;
    return 0;
  }
  return absl::UnavailableError(std::strerror(errno));
}

}  // namespace

absl::StatusOr<size_t> Connection::TrySend(absl::Span<const char> bytes, short* events) {
  if (tls_ != nullptr) return tls_->TrySend(bytes, events);
  const ssize_t n = ::send(fd(), bytes.data(), bytes.size(), MSG_NOSIGNAL | MSG_DONTWAIT);
  if (n > 0) return static_cast<size_t>(n);
  return Failure(POLLOUT, events);
}

absl::StatusOr<size_t> Connection::TryReceive(absl::Span<char> bytes, short* events) {
  if (tls_ != nullptr) return tls_->TryReceive(bytes, events);
  const ssize_t n = ::recv(fd(), bytes.data(), bytes.size(), MSG_DONTWAIT);
  if (n > 0) return static_cast<size_t>(n);
  if (n == 0) return absl::UnavailableError("the peer closed the connection");
  return Failure(POLLIN, events);
}

void Connection::Shutdown() { ::shutdown(fd(), SHUT_RDWR); }

absl::Status AwaitSocket(int fd, short events, absl::Time deadline) {
  while (true) {
    const absl::Duration left = deadline - MonotonicNow();
    const int64_t ms = std::clamp<int64_t>(
        absl::ToInt64Milliseconds(absl::Ceil(left, absl::Milliseconds(1))), 0, 1 << 30);
    pollfd p = {.fd = fd, .events = events, .revents = 0};
    const int n = ::poll(&p, 1, static_cast<int>(ms));
    if (n > 0) return absl::OkStatus();
    if (n == 0) return absl::DeadlineExceededError("timed out");
    if (errno != EINTR) return absl::ErrnoToStatus(errno, "poll");
  }
}

void CloseGently(UniqueFd socket, absl::Duration longest) {
  const absl::Time deadline = MonotonicNow() + longest;
  ::shutdown(socket.get(), SHUT_WR);
  char unread[4096];
  // So many bytes at most: somebody who goes on sending is not listened to for long.
  for (int reads = 0; reads < 64; ++reads) {
    if (!AwaitSocket(socket.get(), POLLIN, deadline).ok()) return;
    if (::recv(socket.get(), unread, sizeof(unread), MSG_DONTWAIT) <= 0) return;
  }
}

}  // namespace presync
