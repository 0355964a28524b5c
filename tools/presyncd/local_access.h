// Who may command presyncd over its local socket: root, presyncd's own user, and the members of one
// group, if one is configured.
#pragma once

#include <sys/types.h>

#include <optional>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace presync {

// Immutable.
class LocalAccess {
 public:
  // `group`: empty for none. NOT_FOUND: this system has no such group.
  static absl::StatusOr<LocalAccess> ForGroup(const std::string& group);

  // Sets owner and mode of the socket at `path`: 0660 for the group, or 0600. The system's error.
  absl::Status ApplyTo(const std::string& path) const;

  // Whether who connected `socket` may, by what the kernel noted then. PERMISSION_DENIED, with who
  // may.
  absl::Status Check(int socket) const;

 private:
  std::string group_;
  std::optional<gid_t> gid_;
};

}  // namespace presync
