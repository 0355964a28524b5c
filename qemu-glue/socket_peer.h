// Who is at the other end of a unix socket, as the kernel knows it.
#pragma once

#include <sys/types.h>

#include "absl/status/statusor.h"
#include "transport/unique_fd.h"

namespace presync {

// A process that is held: as long as `pidfd` has not ended, the number is its own.
struct SocketPeer {
  pid_t pid = -1;
  UniqueFd pidfd;
};

// The process that made the other end: of a connection to a listening socket the one that called
// listen(), which may have passed the socket on since. From Linux 6.5 on the kernel hands out that
// very process. Before, it tells a number, which may have been given to another process since: one
// that runs as another user than the listener did, unless that was root, is refused.
// FAILED_PRECONDITION: it lives in a pid namespace that can't be seen from here. UNAVAILABLE: it
// has ended. PERMISSION_DENIED: the number is another process's now.
absl::StatusOr<SocketPeer> PeerOf(int socket);

}  // namespace presync
