// The address of a socket in the file system.
#pragma once

#include <sys/socket.h>
#include <sys/un.h>

#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"

namespace presync {

// INVALID_ARGUMENT: the path is empty or too long; the text names it. Any thread.
inline absl::StatusOr<sockaddr_un> UnixAddress(const std::string& path) {
  sockaddr_un address = {};
  address.sun_family = AF_UNIX;
  if (path.empty() || path.size() >= sizeof(address.sun_path)) {
    return absl::InvalidArgumentError(absl::StrCat("'", path, "' can't be a socket's path: 1 to ",
                                                   sizeof(address.sun_path) - 1, " bytes fit"));
  }
  path.copy(address.sun_path, path.size());
  return address;
}

// As the system calls want it.
inline const sockaddr* Raw(const sockaddr_un& address) {
  return reinterpret_cast<const sockaddr*>(&address);
}

}  // namespace presync
