#include "qemu-glue/libvirt/unix_socket.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/sockios.h>
#include <poll.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cstring>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "qemu-glue/qmp/wait.h"
#include "transport/clock.h"
#include "transport/unix_address.h"

namespace presync {
namespace {

absl::Status Failed(absl::string_view what, const std::string& path) {
  return absl::UnavailableError(absl::StrCat(what, " ", path, ": ", std::strerror(errno)));
}

}  // namespace

absl::StatusOr<UniqueFd> ListenUnix(const std::string& path) {
  absl::StatusOr<sockaddr_un> address = UnixAddress(path);
  if (!address.ok()) return address.status();
  UniqueFd fd(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
  ::unlink(path.c_str());
  if (::bind(fd.get(), Raw(*address), sizeof(*address)) != 0 || ::chmod(path.c_str(), 0666) != 0 ||
      ::listen(fd.get(), 4) != 0) {
    return Failed("listen at", path);
  }
  return fd;
}

absl::StatusOr<UniqueFd> ConnectUnix(const std::string& path, absl::Time deadline) {
  absl::StatusOr<sockaddr_un> address = UnixAddress(path);
  if (!address.ok()) return address.status();
  while (true) {
    // One that does not accept, with a full queue, would hold up a connect that blocks.
    UniqueFd fd(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
    if (::connect(fd.get(), Raw(*address), sizeof(*address)) == 0) {
      if (::fcntl(fd.get(), F_SETFL, 0) != 0) return Failed("connect to", path);
      return fd;
    }
    if (errno != ENOENT && errno != ECONNREFUSED && errno != EAGAIN) {
      return Failed("connect to", path);
    }
    if (MonotonicNow() >= deadline) {
      return absl::DeadlineExceededError(absl::StrCat("nobody listens at ", path));
    }
    absl::SleepFor(absl::Milliseconds(2));
  }
}

bool IsFromQemu(int fd, const PeerProcess& qemu) {
  ucred peer = {};
  socklen_t size = sizeof(peer);
  if (::getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &peer, &size) != 0) return false;
  if (peer.uid == 0) return true;
  // Held at the same time as QEMU is, so it is QEMU if it has its number.
  const absl::StatusOr<SocketPeer> held = PeerOf(fd);
  return held.ok() && held->pid == qemu.pid() && !qemu.HasEnded();
}

bool WriteToSocket(int fd, std::string_view bytes, absl::Time deadline) {
  while (!bytes.empty()) {
    const ssize_t n = ::send(fd, bytes.data(), bytes.size(), MSG_NOSIGNAL);
    if (n < 0 && errno == EAGAIN) {
      if (!WaitReady(fd, POLLOUT, deadline)) return false;
      continue;
    }
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0) return false;
    bytes.remove_prefix(static_cast<size_t>(n));
  }
  return true;
}

bool HasReadAll(int fd, bool* gone) {
  pollfd p = {.fd = fd, .events = POLLRDHUP, .revents = 0};
  *gone = ::poll(&p, 1, 0) > 0 && (p.revents & (POLLHUP | POLLERR | POLLRDHUP)) != 0;
  int unread = 1;
  return !*gone && ::ioctl(fd, SIOCOUTQ, &unread) == 0 && unread == 0;
}

}  // namespace presync
