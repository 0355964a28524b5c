#include "qemu-glue/qemu_user.h"

#include <grp.h>
#include <linux/capability.h>
#include <pwd.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <utility>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"

namespace presync {
namespace {

constexpr size_t kEntryBytes = 1 << 16;  // of a line in the user database

struct IdRange {
  uid_t first = 0;
  uid_t last = 0;
};

std::optional<uid_t> ParseId(absl::string_view text) {
  uint32_t id = 0;
  if (!absl::SimpleAtoi(text, &id) || id == UINT32_MAX) return std::nullopt;
  return id;
}

// "64200-64299"; a user's name may have a '-', too, but does not begin with a digit.
std::optional<IdRange> ParseRange(absl::string_view text) {
  const std::pair<absl::string_view, absl::string_view> ends = absl::StrSplit(text, '-');
  const std::optional<uid_t> first = ParseId(ends.first);
  const std::optional<uid_t> last = ParseId(ends.second);
  if (!first || !last) return std::nullopt;
  return IdRange{*first, *last};
}

// What presyncd needs to start a QEMU as another user, to end it, and to look at it.
std::string MissingCapabilities() {
  const std::pair<int, const char*> wanted[] = {
      {CAP_CHOWN, "CAP_CHOWN"},   {CAP_DAC_OVERRIDE, "CAP_DAC_OVERRIDE"},
      {CAP_KILL, "CAP_KILL"},     {CAP_SETGID, "CAP_SETGID"},
      {CAP_SETUID, "CAP_SETUID"}, {CAP_SYS_PTRACE, "CAP_SYS_PTRACE"}};
  __user_cap_header_struct header = {.version = _LINUX_CAPABILITY_VERSION_3, .pid = 0};
  __user_cap_data_struct data[_LINUX_CAPABILITY_U32S_3] = {};
  ::syscall(SYS_capget, &header, data);
  std::vector<std::string> missing;
  for (const auto& [bit, name] : wanted) {
    if ((data[0].effective >> bit & 1U) == 0) missing.emplace_back(name);
  }
  return absl::StrJoin(missing, ", ");
}

std::vector<gid_t> GroupsOf(const passwd& entry) {
  int count = 64;
  std::vector<gid_t> groups(static_cast<size_t>(count));
  if (::getgrouplist(entry.pw_name, entry.pw_gid, groups.data(), &count) < 0) {
    groups.resize(static_cast<size_t>(count));
    ::getgrouplist(entry.pw_name, entry.pw_gid, groups.data(), &count);
  }
  groups.resize(static_cast<size_t>(count));
  return groups;
}

absl::StatusOr<ProcessUser> FindUser(const std::string& user) {
  std::vector<char> buffer(kEntryBytes);
  passwd entry = {};
  passwd* found = nullptr;
  const std::optional<uid_t> id = ParseId(user);
  if (id) {
    ::getpwuid_r(*id, &entry, buffer.data(), buffer.size(), &found);
  } else {
    ::getpwnam_r(user.c_str(), &entry, buffer.data(), buffer.size(), &found);
  }
  if (found != nullptr) return ProcessUser{entry.pw_uid, entry.pw_gid, GroupsOf(entry)};
  if (id) return ProcessUser{*id, *id, {}};  // a number needs no name
  return absl::NotFoundError(
      absl::StrCat("this host has no user '", user, "'; useradd --system ", user, " makes it"));
}

absl::StatusOr<gid_t> FindGroup(const std::string& group) {
  std::vector<char> buffer(kEntryBytes);
  struct group entry = {};
  struct group* found = nullptr;
  if (const std::optional<uid_t> id = ParseId(group)) return *id;
  ::getgrnam_r(group.c_str(), &entry, buffer.data(), buffer.size(), &found);
  if (found != nullptr) return entry.gr_gid;
  return absl::NotFoundError(absl::StrCat("qemu_groups: this host has no group '", group, "'"));
}

std::string OwnUser() {
  std::vector<char> buffer(kEntryBytes);
  passwd entry = {};
  passwd* found = nullptr;
  ::getpwuid_r(::geteuid(), &entry, buffer.data(), buffer.size(), &found);
  return found != nullptr ? entry.pw_name : absl::StrCat("uid ", ::geteuid());
}

// FNV-1a: the same guest has the same number on every host and after every start, if it is free.
uint32_t Hash(absl::string_view text) {
  uint32_t hash = 2166136261U;
  for (const char c : text) hash = (hash ^ static_cast<unsigned char>(c)) * 16777619U;
  return hash;
}

absl::Status NotPermitted(absl::string_view setting, absl::string_view missing) {
  return absl::PermissionDeniedError(
      absl::StrCat(setting, ": presyncd can't start QEMUs as another user: it lacks ", missing,
                   "; use the unit presyncd.service, run it as root, or set qemu_user = \"own\""));
}

}  // namespace

absl::Status CheckQemuUsers(const QemuUserConfig& config, size_t guests) {
  if (config.user.empty()) {
    return absl::InvalidArgumentError(
        "qemu_user: must be \"auto\", \"own\", a user, or a range of numbers \"FIRST-LAST\"");
  }
  const std::optional<IdRange> range = ParseRange(config.user);
  if (!range) return absl::OkStatus();
  if (range->first < 1000 || range->last < range->first) {
    return absl::InvalidArgumentError(
        absl::StrCat("qemu_user: '", config.user,
                     "' must be FIRST-LAST, from 1000 on, of numbers that are "
                     "nobody's"));
  }
  if (range->last - range->first + 1 >= guests) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat("qemu_user: '", config.user,
                                                 "' has fewer numbers than there are guests with a "
                                                 "command (",
                                                 guests, ")"));
}

absl::StatusOr<QemuUsers> QemuUsers::Create(const QemuUserConfig& config,
                                            const std::map<std::string, std::string>& of_guests) {
  QemuUsers users;
  const std::string missing = MissingCapabilities();
  for (const std::string& group : config.groups) {
    absl::StatusOr<gid_t> gid = FindGroup(group);
    if (!gid.ok()) return gid.status();
    users.groups_.push_back(*gid);
  }
  const auto find = [&](const std::string& name) -> absl::StatusOr<ProcessUser> {
    absl::StatusOr<ProcessUser> user = FindUser(name);
    if (user.ok())
      user->groups.insert(user->groups.end(), users.groups_.begin(), users.groups_.end());
    return user;
  };
  for (const auto& [guest, name] : of_guests) {
    const std::string setting = absl::StrCat("[guest.\"", guest, "\"]: user");
    absl::StatusOr<ProcessUser> user = find(name);
    if (!user.ok()) {
      return absl::NotFoundError(absl::StrCat(setting, ": ", user.status().message()));
    }
    if (user->uid != ::geteuid() && !missing.empty()) return NotPermitted(setting, missing);
    users.of_guests_[guest] = *std::move(user);
  }
  users.described_ = OwnUser();
  if (const std::optional<IdRange> range = ParseRange(config.user)) {
    if (!missing.empty()) return NotPermitted("qemu_user", missing);
    users.common_is_own_ = false;
    users.first_ = range->first;
    users.last_ = range->last;
    users.described_ = config.user;
    return users;
  }
  const bool automatic = config.user == "auto";
  if (config.user == "own") {
    users.why_not_ = "qemu_user = \"own\" says so";
    return users;
  }
  absl::StatusOr<ProcessUser> user = find(automatic ? kQemuUser : config.user);
  if (!user.ok() && !automatic) {
    return absl::NotFoundError(absl::StrCat("qemu_user: ", user.status().message()));
  }
  if (user.ok() && user->uid == ::geteuid()) {
    users.why_not_ = absl::StrCat("qemu_user = \"", config.user, "\" is presyncd's own user");
    return users;
  }
  if (user.ok() && !missing.empty() && !automatic) return NotPermitted("qemu_user", missing);
  if (!user.ok() || !missing.empty()) {
    users.why_not_ =
        user.ok() ? absl::StrCat("presyncd lacks ", missing, ", which presyncd.service gives it")
                  : absl::StrCat("this host has no user ", kQemuUser,
                                 ": presync.sysusers makes it, or set qemu_user");
    return users;
  }
  users.common_is_own_ = false;
  users.common_ = *std::move(user);
  users.described_ = automatic ? kQemuUser : config.user;
  return users;
}

absl::StatusOr<std::optional<ProcessUser>> QemuUsers::Choose(const std::string& guest,
                                                             const std::set<uid_t>& taken) const {
  if (const auto it = of_guests_.find(guest); it != of_guests_.end()) {
    if (it->second.uid == ::geteuid()) return std::nullopt;
    return it->second;
  }
  if (common_is_own_) return std::nullopt;
  if (!each_its_own()) return common_;
  const uint32_t count = last_ - first_ + 1;
  for (uint32_t i = 0; i < count; ++i) {
    const uid_t id = first_ + (Hash(guest) % count + i) % count;
    const bool guests = std::any_of(of_guests_.begin(), of_guests_.end(),
                                    [&](const auto& each) { return each.second.uid == id; });
    if (!guests && !taken.contains(id)) return ProcessUser{id, id, groups_};
  }
  return absl::ResourceExhaustedError(absl::StrCat("all numbers of qemu_user = \"", described_,
                                                   "\" are other guests'; give it a longer range"));
}

}  // namespace presync
