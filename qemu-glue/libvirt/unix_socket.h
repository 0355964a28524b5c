// Unix sockets that presync shares with a QEMU of libvirt's.
#pragma once

#include <string>
#include <string_view>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "qemu-glue/qmp/peer_process.h"
#include "transport/unique_fd.h"

namespace presync {

// Listens at `path`, which a dead socket may hold; accepting does not block. Any user may connect
// who gets into the folder. UNAVAILABLE: the system's own words.
absl::StatusOr<UniqueFd> ListenUnix(const std::string& path);

// Connects, again and again until somebody listens there and has room. DEADLINE_EXCEEDED: nobody
// did. What comes blocks.
absl::StatusOr<UniqueFd> ConnectUnix(const std::string& path, absl::Time deadline);

// Whether the other end is `qemu`'s, or root's (libvirtd, which may connect for QEMU).
bool IsFromQemu(int fd, const PeerProcess& qemu);

// Writes all of `bytes`, in time; false: nobody reads there, or not any more. A shutdown(2) of the
// socket ends it, too.
bool WriteToSocket(int fd, std::string_view bytes, absl::Time deadline = absl::InfiniteFuture());

// Whether the other end has read all that was written: false too if it is gone (`*gone`).
bool HasReadAll(int fd, bool* gone);

}  // namespace presync
