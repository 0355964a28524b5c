#include "qemu-glue/qmp/listener.h"

#include <errno.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <unistd.h>

#include <cstring>

#include "absl/time/time.h"
#include "qemu-glue/qmp/wait.h"
#include "transport/unique_fd.h"

namespace presync {

bool ListenerLives(const std::string& path) {
  sockaddr_un address = {};
  address.sun_family = AF_UNIX;
  if (path.empty() || path.size() >= sizeof(address.sun_path)) return false;
  std::memcpy(address.sun_path, path.data(), path.size());
  const UniqueFd socket(::socket(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0));
  if (!socket.valid()) return true;
  if (::connect(socket.get(), reinterpret_cast<sockaddr*>(&address), sizeof(address)) != 0) {
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
