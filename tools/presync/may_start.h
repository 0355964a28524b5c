// `presync may-start`: whether a guest may be started on this host. For what starts guests by
// itself: ExecCondition= of a unit, libvirt's hook.
#pragma once

#include "tools/presync/command.h"

namespace presync {

RunCommand AddMayStart(CLI::App* app, CommandContext* context);

}  // namespace presync
