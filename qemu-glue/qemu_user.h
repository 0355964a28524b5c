// Who the QEMUs are that presyncd starts: users apart from presyncd, so that one that was taken
// over is nobody's deputy. docs/security.md, "QEMUs apart".
#pragma once

#include <sys/types.h>

#include <map>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace presync {

// Whom a process runs as.
struct ProcessUser {
  uid_t uid = 0;
  gid_t gid = 0;
  std::vector<gid_t> groups;  // besides `gid`
};

// The user that "auto" means, made by the package.
inline constexpr char kQemuUser[] = "presync-qemu";

struct QemuUserConfig {
  // "auto": presync-qemu where that can be had, else presyncd's own. "own": presyncd's own. A
  // user's name or number. "FIRST-LAST": for each guest one of these numbers, its group the same.
  std::string user = "auto";
  std::vector<std::string> groups;  // of every QEMU that runs apart, besides its user's own
};

// What can be told without a look at this host: the forms of the settings, and a range that has a
// number for each of `guests`. INVALID_ARGUMENT, with what to change.
absl::Status CheckQemuUsers(const QemuUserConfig& config, size_t guests);

// Immutable. Every user is looked up once, when it is made.
class QemuUsers {
 public:
  // All QEMUs as presyncd's own user.
  QemuUsers() = default;

  // `of_guests`: a user (name or number) that a guest has for itself. NOT_FOUND: no such user or
  // group. PERMISSION_DENIED: presyncd lacks the capabilities to be another user; "auto" is never
  // an error.
  static absl::StatusOr<QemuUsers> Create(const QemuUserConfig& config,
                                          const std::map<std::string, std::string>& of_guests);

  // The user for `guest`; none: presyncd's own. `taken`: those of other guests' QEMUs, which a
  // range does not give again. RESOURCE_EXHAUSTED: the range has no other left.
  absl::StatusOr<std::optional<ProcessUser>> Choose(const std::string& guest,
                                                    const std::set<uid_t>& taken) const;

  // Whether QEMUs run as other users than presyncd.
  bool apart() const { return !common_is_own_; }
  // The same, of one guest's at least.
  bool any_apart() const { return apart() || !of_guests_.empty(); }
  // Whether each guest's is another one.
  bool each_its_own() const { return first_ != 0; }
  // "presync-qemu", "64200-64299", or presyncd's own user.
  const std::string& described() const { return described_; }
  // Why QEMUs are not apart, and what to do; empty: they are.
  const std::string& why_not() const { return why_not_; }

 private:
  bool common_is_own_ = true;
  ProcessUser common_;
  uid_t first_ = 0;  // of a range; 0: there is none
  uid_t last_ = 0;
  std::vector<gid_t> groups_;
  std::map<std::string, ProcessUser> of_guests_;
  std::string described_ = "presyncd's own user";
  std::string why_not_;
};

}  // namespace presync
