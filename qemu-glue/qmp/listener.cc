#include "qemu-glue/qmp/listener.h"

#include <errno.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "absl/time/time.h"
#include "qemu-glue/qmp/wait.h"
#include "transport/unique_fd.h"
#include "transport/unix_address.h"

namespace presync {

bool ListenerLives(const std::string& path) {
  const absl::StatusOr<sockaddr_un> address = UnixAddress(path);
  if (!address.ok()) return false;
  const UniqueFd socket(::socket(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0));
  if (!socket.valid()) return true;
  if (::connect(socket.get(), Raw(*address), sizeof(*address)) != 0) {
    return errno != ENOENT && errno != ECONNREFUSED && errno != ENOTDIR;
  }
  ucred credentials = {};
  socklen_t size = sizeof(credentials);
  if (::getsockopt(socket.get(), SOL_SOCKET, SO_PEERCRED, &credentials, &size) != 0) return true;
  if (credentials.pid <= 0) return true;  // of another pid namespace
  const UniqueFd process(static_cast<int>(::syscall(SYS_pidfd_open, credentials.pid, 0)));
  if (!process.valid()) return errno != ESRCH;
  return !WaitReady(process.get(), POLLIN, absl::InfinitePast());  // a zombie has ended, too
}

}  // namespace presync
