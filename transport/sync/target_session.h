// One conversation at the target: from Hello to the end of the connection. docs/protocol.md has the
// states.
#pragma once

#include "transport/sync/target_service.h"
#include "transport/wire/control_channel.h"

namespace presync {

// Runs the conversation in the caller's thread until it ends. Never throws a guest away that may
// run: the slot it served stays with the service.
void RunTargetConversation(TargetService* service, ControlChannel* channel);

}  // namespace presync
