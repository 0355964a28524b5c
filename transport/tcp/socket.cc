#include "transport/tcp/socket.h"

#include <errno.h>
#include <fcntl.h>
#include <ifaddrs.h>
#include <netdb.h>
#include <netinet/in.h>
#include <poll.h>
#include <string.h>
#include <sys/socket.h>

#include <algorithm>
#include <climits>
#include <memory>
#include <optional>
#include <utility>

#include "absl/strings/str_cat.h"
#include "transport/clock.h"

namespace presync {
namespace {

constexpr int kBacklog = 128;  // a pending guest has up to 64 streams

struct FreeAddresses {
  void operator()(addrinfo* list) const { freeaddrinfo(list); }
};
using Addresses = std::unique_ptr<addrinfo, FreeAddresses>;

absl::StatusOr<Addresses> Resolve(const std::string& host, uint16_t port, int flags) {
  addrinfo hints = {};
  hints.ai_family = AF_UNSPEC;
  hints.ai_socktype = SOCK_STREAM;
  hints.ai_flags = flags | AI_NUMERICSERV;
  addrinfo* list = nullptr;
  const int error = getaddrinfo(host.empty() ? nullptr : host.c_str(), std::to_string(port).c_str(),
                                &hints, &list);
  if (error == 0) return Addresses(list);
  return absl::NotFoundError(absl::StrCat("look up ", host, ": ", gai_strerror(error)));
}

UniqueFd NewSocket(const addrinfo& address) {
  return UniqueFd(socket(address.ai_family, address.ai_socktype | SOCK_CLOEXEC | SOCK_NONBLOCK,
                         address.ai_protocol));
}

// Waits until `fd` is ready for `events`. DEADLINE_EXCEEDED: it was not in time.
absl::Status Await(int fd, int16_t events, absl::Time deadline) {
  while (true) {
    const absl::Duration left = std::max(deadline - MonotonicNow(), absl::ZeroDuration());
    const int64_t left_ms = std::min<int64_t>(absl::ToInt64Milliseconds(left), INT_MAX - 1);
    pollfd ready = {fd, events, 0};
    // Rounded up, so that a fraction of a millisecond is not polled away.
    const int count = poll(&ready, 1, static_cast<int>(left_ms) + (left > absl::ZeroDuration()));
    if (count > 0) return absl::OkStatus();
    if (count < 0 && errno != EINTR) return absl::ErrnoToStatus(errno, "poll");
    if (MonotonicNow() >= deadline) return absl::DeadlineExceededError("no answer in time");
  }
}

absl::Status MakeBlocking(int fd) {
  const int flags = fcntl(fd, F_GETFL);
  if (flags >= 0 && fcntl(fd, F_SETFL, flags & ~O_NONBLOCK) == 0) return absl::OkStatus();
  return absl::ErrnoToStatus(errno, "make a socket blocking");
}

absl::Status ConnectError(const std::string& peer, int error) {
  const char* hint = error == ECONNREFUSED ? "; is presyncd running there?"
                     : error == EHOSTUNREACH || error == ENETUNREACH ? "; is there a route to it?"
                                                                     : "";
  const std::string cause = error == ECONNREFUSED ? "connection refused" : strerror(error);
  return absl::UnavailableError(absl::StrCat("connect to ", peer, ": ", cause, hint));
}

absl::StatusOr<UniqueFd> ConnectTo(const addrinfo& address, const std::string& peer,
                                   absl::Time deadline) {
  UniqueFd fd = NewSocket(address);
  if (!fd.valid()) return ConnectError(peer, errno);
  if (connect(fd.get(), address.ai_addr, address.ai_addrlen) != 0 && errno != EINPROGRESS) {
    return ConnectError(peer, errno);
  }
  if (auto status = Await(fd.get(), POLLOUT, deadline); absl::IsDeadlineExceeded(status)) {
    return absl::DeadlineExceededError(absl::StrCat(
        "connect to ", peer, ": no answer in time; is the host up and its firewall open?"));
  } else if (!status.ok()) {
    return status;
  }
  int error = 0;
  socklen_t size = sizeof(error);
  if (getsockopt(fd.get(), SOL_SOCKET, SO_ERROR, &error, &size) != 0) error = errno;
  if (error != 0) return ConnectError(peer, error);
  if (auto status = MakeBlocking(fd.get()); !status.ok()) return status;
  return fd;
}

// One form for both families; nothing for others. The zone of a link-local address is left out.
std::optional<in6_addr> AsIpv6(const sockaddr* address) {
  in6_addr result = {};
  if (address == nullptr) return std::nullopt;
  if (address->sa_family == AF_INET6) {
    return reinterpret_cast<const sockaddr_in6*>(address)->sin6_addr;
  }
  if (address->sa_family != AF_INET) return std::nullopt;
  result.s6_addr[10] = result.s6_addr[11] = 0xff;  // ::ffff:a.b.c.d
  memcpy(&result.s6_addr[12], &reinterpret_cast<const sockaddr_in*>(address)->sin_addr, 4);
  return result;
}

bool IsLoopback(const in6_addr& address) {
  return IN6_IS_ADDR_LOOPBACK(&address) ||
         (IN6_IS_ADDR_V4MAPPED(&address) && address.s6_addr[12] == 127);
}

}  // namespace

std::string FormatHostPort(const std::string& host, uint16_t port) {
  const bool is_ipv6 = host.find(':') != std::string::npos;
  return is_ipv6 ? absl::StrCat("[", host, "]:", port) : absl::StrCat(host, ":", port);
}

absl::StatusOr<UniqueFd> Listen(const std::string& address, uint16_t port) {
  auto addresses = Resolve(address, port, AI_PASSIVE);
  if (!addresses.ok()) return addresses.status();
  const std::string what = absl::StrCat("listen on ", FormatHostPort(address, port));
  absl::Status last = absl::NotFoundError(absl::StrCat(what, ": no address"));
  // IPv6 first where every address is asked for: such a socket takes IPv4 as well.
  for (const int family : {AF_INET6, AF_INET}) {
    for (const addrinfo* a = addresses->get(); a != nullptr; a = a->ai_next) {
      if (a->ai_family != family) continue;
      UniqueFd fd = NewSocket(*a);
      const int on = 1;
      const int off = 0;
      if (family == AF_INET6 && fd.valid()) {
        setsockopt(fd.get(), IPPROTO_IPV6, IPV6_V6ONLY, &off, sizeof(off));
      }
      if (fd.valid() && setsockopt(fd.get(), SOL_SOCKET, SO_REUSEADDR, &on, sizeof(on)) == 0 &&
          bind(fd.get(), a->ai_addr, a->ai_addrlen) == 0 && listen(fd.get(), kBacklog) == 0) {
        return fd;
      }
      last = errno == EADDRINUSE ? absl::AlreadyExistsError(absl::StrCat(
                                       what, ": the port is in use; is another presyncd running?"))
                                 : absl::ErrnoToStatus(errno, what);
    }
  }
  return last;
}

absl::StatusOr<uint16_t> BoundPort(int socket) {
  sockaddr_storage address = {};
  socklen_t size = sizeof(address);
  if (getsockname(socket, reinterpret_cast<sockaddr*>(&address), &size) != 0) {
    return absl::ErrnoToStatus(errno, "ask for a socket's port");
  }
  if (address.ss_family == AF_INET) {
    return ntohs(reinterpret_cast<const sockaddr_in*>(&address)->sin_port);
  }
  return ntohs(reinterpret_cast<const sockaddr_in6*>(&address)->sin6_port);
}

std::string PeerAddress(int socket) {
  sockaddr_storage address = {};
  socklen_t size = sizeof(address);
  char host[NI_MAXHOST] = {};
  if (getpeername(socket, reinterpret_cast<sockaddr*>(&address), &size) != 0 ||
      getnameinfo(reinterpret_cast<sockaddr*>(&address), size, host, sizeof(host), nullptr, 0,
                  NI_NUMERICHOST) != 0) {
    return "unknown";
  }
  return host;
}

bool IsPeerOnThisHost(int socket) {
  sockaddr_storage address = {};
  socklen_t size = sizeof(address);
  if (getpeername(socket, reinterpret_cast<sockaddr*>(&address), &size) != 0) return false;
  const std::optional<in6_addr> peer = AsIpv6(reinterpret_cast<const sockaddr*>(&address));
  if (!peer.has_value()) return address.ss_family == AF_UNIX;
  if (IsLoopback(*peer)) return true;
  ifaddrs* list = nullptr;
  if (getifaddrs(&list) != 0) return false;
  bool found = false;
  for (const ifaddrs* i = list; i != nullptr && !found; i = i->ifa_next) {
    const std::optional<in6_addr> own = AsIpv6(i->ifa_addr);
    found = own.has_value() && memcmp(&*own, &*peer, sizeof(in6_addr)) == 0;
  }
  freeifaddrs(list);
  return found;
}

std::string PeerName(int socket) {
  sockaddr_storage address = {};
  socklen_t size = sizeof(address);
  char host[NI_MAXHOST] = {};
  char port[NI_MAXSERV] = {};
  if (getpeername(socket, reinterpret_cast<sockaddr*>(&address), &size) != 0 ||
      getnameinfo(reinterpret_cast<sockaddr*>(&address), size, host, sizeof(host), port,
                  sizeof(port), NI_NUMERICHOST | NI_NUMERICSERV) != 0) {
    return "unknown";
  }
  const bool v6 = address.ss_family == AF_INET6;
  return v6 ? absl::StrCat("[", host, "]:", port) : absl::StrCat(host, ":", port);
}

absl::StatusOr<UniqueFd> Accept(int listener, absl::Time deadline) {
  while (true) {
    if (auto status = Await(listener, POLLIN, deadline); absl::IsDeadlineExceeded(status)) {
      return absl::DeadlineExceededError("accept: nobody connected in time");
    } else if (!status.ok()) {
      return status;
    }
    UniqueFd fd(accept4(listener, nullptr, nullptr, SOCK_CLOEXEC));
    if (fd.valid()) return fd;
    // The one that was ready may be gone again.
    const bool retry = errno == EINTR || errno == EAGAIN || errno == ECONNABORTED;
    if (!retry) return absl::ErrnoToStatus(errno, "accept");
  }
}

absl::StatusOr<UniqueFd> Connect(const std::string& host, uint16_t port, absl::Time deadline) {
  auto addresses = Resolve(host, port, 0);
  if (!addresses.ok()) return addresses.status();
  const std::string peer = FormatHostPort(host, port);
  absl::Status last = absl::NotFoundError(absl::StrCat("connect to ", peer, ": no address"));
  for (const addrinfo* a = addresses->get(); a != nullptr; a = a->ai_next) {
    auto fd = ConnectTo(*a, peer, deadline);
    if (fd.ok()) return fd;
    last = fd.status();
  }
  return last;
}

}  // namespace presync
