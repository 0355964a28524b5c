// Starts a program that is not trusted: as another user, with nothing that it could take back.
#pragma once

#include <sys/types.h>

#include <optional>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "qemu-glue/qemu_user.h"

namespace presync {

// The program `argv` (the binary first, searched in PATH; no shell in between), in a session of its
// own, in the folder /, without input, with `output` for what it writes and no other descriptor of
// ours; as `user`, or as ours. It and what it starts get no rights by executing a file
// (no_new_privs), and, where the kernel has Landlock, look at and signal no process but each other
// (signals: Linux 6.12). NOT_FOUND, PERMISSION_DENIED and others: it could not be started, with the
// step that failed; nothing is left of it.
absl::StatusOr<pid_t> SpawnApart(const std::vector<std::string>& argv, int output,
                                 const std::optional<ProcessUser>& user);

// The version of the kernel's Landlock that SpawnApart uses; 0: there is none.
int LandlockVersion();

}  // namespace presync
