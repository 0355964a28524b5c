#include "tools/presyncd/qemu_users_api.h"

#include <algorithm>
#include <map>
#include <string>

#include "absl/strings/str_cat.h"
#include "qemu-glue/spawn_apart.h"

namespace presync {

absl::StatusOr<QemuUsers> FindQemuUsers(const Config& config) {
  std::map<std::string, std::string> of_guests;
  for (const auto& [name, guest] : config.guests) {
    if (!guest.user.empty()) of_guests[name] = guest.user;
  }
  return QemuUsers::Create(config.qemu, of_guests);
}

nlohmann::json QemuUsersToJson(const QemuUsers& users) {
  return {{"user", users.described()},
          {"apart", users.apart()},
          {"each_its_own", users.each_its_own()},
          {"why_not", users.why_not()},
          {"landlock", LandlockVersion()}};
}

std::string NotApart(const Config& config, const QemuUsers& users) {
  const bool starts = std::any_of(config.guests.begin(), config.guests.end(), [](const auto& each) {
    return !each.second.command.empty() && each.second.user.empty();
  });
  if (!starts || users.apart() || config.qemu.user == "own") return "";
  return absl::StrCat(
      "QEMUs are started as presyncd's own user (", users.described(),
      "), so one that is taken over by its guest reaches all that presyncd has: ", users.why_not());
}

}  // namespace presync
