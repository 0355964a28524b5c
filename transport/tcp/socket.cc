#include "transport/tcp/socket.h"

#include <errno.h>
#include <fcntl.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/socket.h>

#include <cstring>
#include <memory>

#include "absl/strings/str_cat.h"

namespace presync {
namespace {
struct Free { void operator()(addrinfo* a) const { ::freeaddrinfo(a); } };
absl::StatusOr<std::unique_ptr<addrinfo, Free>> Resolve(const std::string& host, uint16_t port, bool passive) {
  addrinfo hints = {};
  hints.ai_socktype = SOCK_STREAM;
  hints.ai_flags = AI_NUMERICSERV | (passive ? AI_PASSIVE : 0);
  addrinfo* found = nullptr;
  const int e = ::getaddrinfo(host.c_str(), absl::StrCat(port).c_str(), &hints, &found);
  if (e != 0) return absl::InvalidArgumentError(absl::StrCat("host ", host, ": ", ::gai_strerror(e)));
  return std::unique_ptr<addrinfo, Free>(found);
}
bool Await(int fd, short ev, absl::Time deadline) {
  pollfd p = {fd, ev, 0};
  int64_t ms = std::max<int64_t>(0, absl::ToInt64Milliseconds(deadline - absl::Now()));
  return ::poll(&p, 1, static_cast<int>(ms)) > 0;
}
}  // namespace

absl::StatusOr<UniqueFd> ListenSocket(const std::string& host, uint16_t port) {
  auto a = Resolve(host, port, true);
  if (!a.ok()) return a.status();
  UniqueFd fd(::socket((*a)->ai_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
  int one = 1;
  ::setsockopt(fd.get(), SOL_SOCKET, SO_REUSEADDR, &one, sizeof(one));
  if (::bind(fd.get(), (*a)->ai_addr, (*a)->ai_addrlen) != 0 || ::listen(fd.get(), 64) != 0)
    return absl::UnavailableError(absl::StrCat("listen at ", host, ":", port, ": ", std::strerror(errno)));
  return fd;
}
absl::StatusOr<UniqueFd> ConnectSocket(const std::string& host, uint16_t port, absl::Time deadline) {
  auto a = Resolve(host, port, false);
  if (!a.ok()) return a.status();
  UniqueFd fd(::socket((*a)->ai_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
  int e = 0;
  if (::connect(fd.get(), (*a)->ai_addr, (*a)->ai_addrlen) != 0) {
    e = errno;
    if (e == EINPROGRESS) {
      if (!Await(fd.get(), POLLOUT, deadline)) return absl::DeadlineExceededError(absl::StrCat("connect to ", host, ":", port, ": timed out"));
      socklen_t n = sizeof(e);
      ::getsockopt(fd.get(), SOL_SOCKET, SO_ERROR, &e, &n);
    }
  }
  if (e != 0) return absl::UnavailableError(absl::StrCat("connect to ", host, ":", port, ": ", std::strerror(e), "; is presyncd running there?"));
  int one = 1;
  ::setsockopt(fd.get(), IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one));
  return fd;
}
absl::StatusOr<AcceptedSocket> AcceptSocket(int listener, absl::Time deadline) {
  if (!Await(listener, POLLIN, deadline)) return absl::DeadlineExceededError("nobody came");
  sockaddr_storage s;
  socklen_t n = sizeof(s);
  UniqueFd fd(::accept4(listener, reinterpret_cast<sockaddr*>(&s), &n, SOCK_CLOEXEC | SOCK_NONBLOCK));
  if (!fd.valid()) return absl::UnavailableError(std::strerror(errno));
  int one = 1;
  ::setsockopt(fd.get(), IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one));
  char h[128] = "", p[16] = "";
  ::getnameinfo(reinterpret_cast<sockaddr*>(&s), n, h, sizeof(h), p, sizeof(p), NI_NUMERICHOST | NI_NUMERICSERV);
  return AcceptedSocket{std::move(fd), absl::StrCat(h, ":", p)};
}
}  // namespace presync
