// `presync libvirt`: what a domain's XML needs, and what libvirt's hook calls.
#pragma once

#include "tools/presync/command.h"

namespace presync {

RunCommand AddLibvirt(CLI::App* app, CommandContext* context);

}  // namespace presync
