#include "qemu-glue/qmp/listener.h"

#include <errno.h>
#include <sys/socket.h>

#include "absl/time/time.h"
#include "qemu-glue/qmp/wait.h"
#include "qemu-glue/socket_peer.h"
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
  const absl::StatusOr<SocketPeer> peer = PeerOf(socket.get());
  if (!peer.ok()) return !absl::IsUnavailable(peer.status());
  return !WaitReady(peer->pidfd.get(), POLLIN, absl::InfinitePast());  // a zombie has ended, too
}

}  // namespace presync
