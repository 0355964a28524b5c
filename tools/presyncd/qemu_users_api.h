// Whom the QEMUs run as that presyncd starts: found by its configuration, and told to operators.
#pragma once

#include <nlohmann/json.hpp>
#include <string>

#include "absl/status/statusor.h"
#include "qemu-glue/qemu_user.h"
#include "tools/presyncd/config.h"

namespace presync {

// Errors as QemuUsers::Create.
absl::StatusOr<QemuUsers> FindQemuUsers(const Config& config);

// "qemu" of a status: docs/protocol.md, "status".
nlohmann::json QemuUsersToJson(const QemuUsers& users);

// What an operator has to know where guests may be started here and their QEMUs are not apart;
// empty: they are, or the configuration wants it so.
std::string NotApart(const Config& config, const QemuUsers& users);

}  // namespace presync
