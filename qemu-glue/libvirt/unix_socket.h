// Unix sockets that presync shares with a QEMU of libvirt's.
#pragma once

#include <sys/types.h>

#include <string>
#include <string_view>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "transport/unique_fd.h"

namespace presync {

// Listens at `path`, which a dead socket may hold; accepting does not block. Any user may connect
// who gets into the folder. UNAVAILABLE: the system's own words.
absl::StatusOr<UniqueFd> ListenUnix(const std::string& path);

// Connects, again and again until somebody listens there. DEADLINE_EXCEEDED: nobody did.
absl::StatusOr<UniqueFd> ConnectUnix(const std::string& path, absl::Time deadline);

// Whether the other end is process `pid`, or root's (libvirtd, which may connect for QEMU).
bool IsFromQemu(int fd, pid_t pid);

// Writes all of `bytes`, however long it takes; false: nobody reads there any more.
bool WriteToSocket(int fd, std::string_view bytes);

// Whether the other end has read all that was written: false too if it is gone (`*gone`).
bool HasReadAll(int fd, bool* gone);

}  // namespace presync
