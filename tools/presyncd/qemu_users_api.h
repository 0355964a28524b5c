// Whom the QEMUs run as that presyncd starts: found by its configuration, and told to operators.
#pragma once

#include <nlohmann/json.hpp>

#include "absl/status/statusor.h"
#include "qemu-glue/qemu_user.h"
#include "tools/presyncd/config.h"

namespace presync {

// Errors as QemuUsers::Create.
absl::StatusOr<QemuUsers> FindQemuUsers(const Config& config);

// "qemu" of a status: docs/protocol.md, "status".
nlohmann::json QemuUsersToJson(const QemuUsers& users);

// Says in the log, where guests may be started here, what keeps their QEMUs from being apart,
// unless the configuration wants it so.
void WarnOfQemuUsers(const Config& config, const QemuUsers& users);

}  // namespace presync
