// Waiting for a descriptor until a point in time.
#pragma once

#include <poll.h>

#include "absl/time/time.h"

namespace presync {

// Blocks until `fd` has one of `events` (POLLIN, ...), an error or a hang-up: true; or until
// `deadline`: false. Looks once even if the deadline has passed.
bool WaitReady(int fd, short events, absl::Time deadline);

}  // namespace presync
