#include "qemu-glue/socket_peer.h"

#include <fcntl.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <fstream>
#include <optional>
#include <string>

#include "absl/strings/str_cat.h"

// Linux 6.5; Debian 12's headers are older.
#ifndef SO_PEERPIDFD
#define SO_PEERPIDFD 77
#endif

namespace presync {
namespace {

absl::Status HasEnded(pid_t pid) {
  return absl::UnavailableError(
      absl::StrCat("the process that opened the socket (", pid, ") has ended"));
}

// The effective user of a process: the second number behind "Uid:" in /proc/PID/status.
std::optional<uid_t> UserOf(pid_t pid) {
  std::ifstream file(absl::StrCat("/proc/", pid, "/status"));
  std::string word;
  uid_t real = 0;
  uid_t effective = 0;
  while (file >> word) {
    if (word == "Uid:" && file >> real >> effective) return effective;
  }
  return std::nullopt;
}

// Before Linux 6.5.
absl::StatusOr<SocketPeer> FindByNumber(const ucred& listener) {
  const pid_t pid = listener.pid;
  SocketPeer peer = {pid, UniqueFd(static_cast<int>(::syscall(SYS_pidfd_open, pid, 0)))};
  const std::optional<uid_t> user = UserOf(pid);
  if (!peer.pidfd.valid() || !user.has_value()) return HasEnded(pid);
  if (*user == listener.uid || listener.uid == 0) return peer;
  return absl::PermissionDeniedError(
      absl::StrCat("the socket was opened by user ", listener.uid, ", and process ", pid,
                   ", which has its opener's number now, runs as user ", *user));
}

}  // namespace

absl::StatusOr<SocketPeer> PeerOf(int socket) {
  ucred listener = {};
  socklen_t size = sizeof(listener);
  if (::getsockopt(socket, SOL_SOCKET, SO_PEERCRED, &listener, &size) != 0) {
    return absl::ErrnoToStatus(errno, "asking who is at the other end of a socket");
  }
  if (listener.pid <= 0) {
    return absl::FailedPreconditionError(
        "the process that opened the socket can't be seen from here, it runs in another pid "
        "namespace: run presyncd in the host's");
  }
  int pidfd = -1;
  size = sizeof(pidfd);
  if (::getsockopt(socket, SOL_SOCKET, SO_PEERPIDFD, &pidfd, &size) == 0) {
    SocketPeer peer = {listener.pid, UniqueFd(pidfd)};
    ::fcntl(pidfd, F_SETFD, FD_CLOEXEC);
    return peer;
  }
  if (errno == ENOPROTOOPT) return FindByNumber(listener);
  if (errno == EMFILE || errno == ENFILE) {
    return absl::ErrnoToStatus(errno, "taking hold of the process behind a socket");
  }
  return HasEnded(listener.pid);
}

}  // namespace presync
