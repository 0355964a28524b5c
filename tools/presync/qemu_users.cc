#include "tools/presync/qemu_users.h"

#include <string>

#include "absl/strings/str_cat.h"
#include "tools/common/local_api.h"

namespace presync {
namespace {

constexpr char kWhat[] = "QEMUs";

}  // namespace

std::vector<Finding> JudgeQemuUsers(const nlohmann::json& qemu) {
  if (!qemu.is_object() || qemu.empty()) return {};
  std::vector<Finding> findings;
  const std::string user = TextOr(qemu, "user", "");
  if (!FlagOr(qemu, "apart", false)) {
    findings.push_back(Note(
        kWhat,
        absl::StrCat("those that presyncd starts run as its own user, ", user,
                     ": one that its guest takes over reaches the records, the key and the other "
                     "guests (",
                     TextOr(qemu, "why_not", ""), ")"),
        "run presyncd by its unit with the user presync-qemu, or set qemu_user: docs/security.md, "
        "QEMUs apart"));
  } else if (!FlagOr(qemu, "each_its_own", false)) {
    findings.push_back(Note(
        kWhat,
        absl::StrCat("those that presyncd starts run as ", user,
                     ", apart from it, but all as one "
                     "user"),
        "qemu_user = \"FIRST-LAST\" gives each guest a user number of its own: docs/security.md, "
        "QEMUs apart"));
  } else {
    findings.push_back(Good(kWhat, absl::StrCat("each that presyncd starts runs as a user of its "
                                                "own, one of ",
                                                user)));
  }
  if (NumberOr(qemu, "landlock", 0) == 0) {
    findings.push_back(Note("Landlock", "this kernel has none, or presyncd may not use it",
                            "boot with landlock in lsm=: then a QEMU can't look into other "
                            "processes of its user"));
  }
  return findings;
}

}  // namespace presync
