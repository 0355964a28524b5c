#include "transport/tcp/byte_stream.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/tcp.h>  // netinet/tcp.h lacks the newer half of tcp_info
#include <netinet/in.h>
#include <sys/socket.h>

#include <algorithm>
#include <cstddef>
#include <optional>
#include <system_error>
#include <utility>

#include "absl/strings/str_cat.h"
#include "transport/memory_faults.h"

namespace presync {
namespace {

absl::Status Gone(const char* operation, int error) {
  const char* hint = error == ETIMEDOUT || error == EHOSTUNREACH
                         ? "; is the peer's host up and the network connected?"
                         : "";
  return absl::UnavailableError(
      absl::StrCat(operation, ": ", std::generic_category().message(error), hint));
}

// The kernel could not read or write one of these buffers, which no other error says.
void NoteUnreadable(absl::Span<const iovec> parts) {
  for (const iovec& part : parts) presync::NoteUnreadable(part.iov_base);
}

class SocketStream final : public ByteStream {
 public:
  explicit SocketStream(UniqueFd socket) : socket_(std::move(socket)) {}

  absl::Status Send(absl::Span<iovec> parts) override {
    while (!parts.empty()) {
      msghdr message = {};
      message.msg_iov = parts.data();
      message.msg_iovlen = parts.size();
      const ssize_t sent = sendmsg(socket_.get(), &message, MSG_NOSIGNAL);
      if (sent < 0 && errno == EINTR) continue;
      if (sent < 0 && errno == EFAULT) NoteUnreadable(parts);
      if (sent < 0) return Gone("send", errno);
      size_t left = static_cast<size_t>(sent);
      while (!parts.empty() && left >= parts.front().iov_len) {
        left -= parts.front().iov_len;
        parts.remove_prefix(1);
      }
      if (left > 0) {
        parts.front().iov_base = static_cast<std::byte*>(parts.front().iov_base) + left;
        parts.front().iov_len -= left;
      }
    }
    return absl::OkStatus();
  }

  absl::StatusOr<size_t> Receive(absl::Span<const iovec> parts) override {
    msghdr message = {};
    message.msg_iov = const_cast<iovec*>(parts.data());  // recvmsg does not change it
    message.msg_iovlen = parts.size();
    while (true) {
      const ssize_t received = recvmsg(socket_.get(), &message, 0);
      if (received > 0) return static_cast<size_t>(received);
      if (received == 0) return absl::UnavailableError("receive: the peer closed the connection");
      if (errno == EFAULT) NoteUnreadable(parts);
      if (errno != EINTR) return Gone("receive", errno);
    }
  }

  void Shutdown() override { shutdown(socket_.get(), SHUT_RDWR); }

  void SetPacing(uint64_t bytes_per_s) override {
    const unsigned long rate = bytes_per_s == 0 ? ~0ul : bytes_per_s;  // NOLINT: the kernel's type
    setsockopt(socket_.get(), SOL_SOCKET, SO_MAX_PACING_RATE, &rate, sizeof(rate));
  }

  // The kernel's smoothed round trip above the least of the last 5 minutes (tcp_min_rtt_wlen).
  std::optional<PathState> path() const override {
    tcp_info info = {};
    socklen_t length = sizeof(info);
    if (getsockopt(socket_.get(), IPPROTO_TCP, TCP_INFO, &info, &length) != 0 ||
        length < offsetof(tcp_info, tcpi_min_rtt) + sizeof(info.tcpi_min_rtt) ||
        info.tcpi_min_rtt == 0) {
      return std::nullopt;
    }
    const uint32_t queued_us = info.tcpi_rtt - std::min(info.tcpi_rtt, info.tcpi_min_rtt);
    return PathState{.queueing_delay = absl::Microseconds(queued_us),
                     .round_trip = absl::Microseconds(info.tcpi_min_rtt),
                     .age = absl::Milliseconds(info.tcpi_last_ack_recv),
                     .retransmits = info.tcpi_total_retrans};
  }

 private:
  const UniqueFd socket_;
};

absl::Status SetOption(int fd, int level, int name, int value, const char* what) {
  if (setsockopt(fd, level, name, &value, sizeof(value)) == 0) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat("set ", what, " of a socket to ", value, ": errno ", errno));
}

absl::Status SetTcpOptions(int fd, const SocketOptions& options) {
  const int timeout_ms = static_cast<int>(absl::ToInt64Milliseconds(options.peer_timeout));
  // Three unanswered probes fill the timeout, also on a connection with nothing to send.
  const int probe_s = std::max(1, timeout_ms / 3000);
  const struct {
    int level, name, value;
    const char* what;
  } settings[] = {
      {IPPROTO_TCP, TCP_NODELAY, 1, "TCP_NODELAY"},
      {SOL_SOCKET, SO_KEEPALIVE, 1, "SO_KEEPALIVE"},
      {IPPROTO_TCP, TCP_KEEPIDLE, probe_s, "TCP_KEEPIDLE"},
      {IPPROTO_TCP, TCP_KEEPINTVL, probe_s, "TCP_KEEPINTVL"},
      {IPPROTO_TCP, TCP_KEEPCNT, 3, "TCP_KEEPCNT"},
      {IPPROTO_TCP, TCP_USER_TIMEOUT, timeout_ms, "TCP_USER_TIMEOUT"},
  };
  for (const auto& s : settings) {
    if (auto status = SetOption(fd, s.level, s.name, s.value, s.what); !status.ok()) return status;
  }
  if (options.max_unsent_bytes == 0) return absl::OkStatus();
  return SetOption(fd, IPPROTO_TCP, TCP_NOTSENT_LOWAT, options.max_unsent_bytes,
                   "TCP_NOTSENT_LOWAT");
}

}  // namespace

absl::StatusOr<std::unique_ptr<ByteStream>> MakeSocketStream(UniqueFd socket,
                                                             const SocketOptions& options) {
  const int fd = socket.get();
  int type = 0;
  int domain = 0;
  socklen_t size = sizeof(int);
  sockaddr_storage peer;
  socklen_t peer_size = sizeof(peer);
  if (getsockopt(fd, SOL_SOCKET, SO_TYPE, &type, &size) != 0 || type != SOCK_STREAM ||
      getsockopt(fd, SOL_SOCKET, SO_DOMAIN, &domain, &size) != 0 ||
      getpeername(fd, reinterpret_cast<sockaddr*>(&peer), &peer_size) != 0) {
    return absl::InvalidArgumentError("a link's stream needs a connected stream socket");
  }
  const int flags = fcntl(fd, F_GETFL);
  if (flags < 0 || fcntl(fd, F_SETFL, flags & ~O_NONBLOCK) != 0) {
    return absl::ErrnoToStatus(errno, "make a socket blocking");
  }
  if (options.send_buffer_bytes != 0) {
    auto status = SetOption(fd, SOL_SOCKET, SO_SNDBUF, options.send_buffer_bytes, "SO_SNDBUF");
    if (!status.ok()) return status;
  }
  if (domain == AF_INET || domain == AF_INET6) {
    if (auto status = SetTcpOptions(fd, options); !status.ok()) return status;
  }
  return std::make_unique<SocketStream>(std::move(socket));
}

}  // namespace presync
