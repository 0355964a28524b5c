// presync report: a guest's sync and launches as a page.
#pragma once

#include "tools/presync/command.h"

namespace presync {

RunCommand AddReport(CLI::App* app, CommandContext* context);

}  // namespace presync
