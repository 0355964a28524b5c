// The subcommands about a guest's sync: start, status, launch, stop.
#pragma once

#include "tools/presync/command.h"

namespace presync {

RunCommand AddStart(CLI::App* app, CommandContext* context);
RunCommand AddStatus(CLI::App* app, CommandContext* context);
RunCommand AddLaunch(CLI::App* app, CommandContext* context);
RunCommand AddVerify(CLI::App* app, CommandContext* context);
RunCommand AddStop(CLI::App* app, CommandContext* context);
RunCommand AddSettle(CLI::App* app, CommandContext* context);

}  // namespace presync
