#include "tools/presyncd/local_access.h"

#include <errno.h>
#include <grp.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <vector>

#include "absl/strings/str_cat.h"

namespace presync {
namespace {

// The groups besides the first that the process at the other end had when it connected.
std::vector<gid_t> PeerGroups(int socket) {
  std::vector<gid_t> groups(64);
  while (true) {
    socklen_t bytes = static_cast<socklen_t>(groups.size() * sizeof(gid_t));
    if (::getsockopt(socket, SOL_SOCKET, SO_PEERGROUPS, groups.data(), &bytes) == 0) {
      groups.resize(bytes / sizeof(gid_t));
      return groups;
    }
    if (errno != ERANGE || bytes <= groups.size() * sizeof(gid_t)) return {};
    groups.resize(bytes / sizeof(gid_t));
  }
}

}  // namespace

absl::StatusOr<LocalAccess> LocalAccess::ForGroup(const std::string& group) {
  LocalAccess access;
  if (group.empty()) return access;
  std::vector<char> buffer(1 << 16);
  struct group entry = {};
  struct group* found = nullptr;
  if (::getgrnam_r(group.c_str(), &entry, buffer.data(), buffer.size(), &found) != 0 ||
      found == nullptr) {
    return absl::NotFoundError(absl::StrCat("socket_group: this host has no group '", group,
                                            "'; groupadd --system ", group, " makes it"));
  }
  access.group_ = group;
  access.gid_ = found->gr_gid;
  return access;
}

absl::Status LocalAccess::ApplyTo(const std::string& path) const {
  if (gid_.has_value() && ::chown(path.c_str(), static_cast<uid_t>(-1), *gid_) != 0) {
    return absl::ErrnoToStatus(errno, absl::StrCat("give ", path, " to group ", group_,
                                                   " (presyncd's user must be in it)"));
  }
  if (::chmod(path.c_str(), gid_.has_value() ? 0660 : 0600) == 0) return absl::OkStatus();
  return absl::ErrnoToStatus(errno, absl::StrCat("set the mode of ", path));
}

absl::Status LocalAccess::Check(int socket) const {
  ucred peer = {};
  socklen_t size = sizeof(peer);
  if (::getsockopt(socket, SOL_SOCKET, SO_PEERCRED, &peer, &size) != 0) {
    return absl::PermissionDeniedError("presyncd can't tell who is asking");
  }
  if (peer.uid == 0 || peer.uid == ::geteuid()) return absl::OkStatus();
  if (gid_.has_value()) {
    const std::vector<gid_t> groups = PeerGroups(socket);
    if (peer.gid == *gid_ || std::count(groups.begin(), groups.end(), *gid_) > 0) {
      return absl::OkStatus();
    }
  }
  return absl::PermissionDeniedError(absl::StrCat(
      "user ", peer.uid, " may not command presyncd here: root, presyncd's own user",
      gid_.has_value() ? absl::StrCat(" and members of group ", group_, " may")
                       : " may; socket_group in presyncd.toml names a group that may, too"));
}

}  // namespace presync
