// Making guest memory zero on behalf of a source.
#pragma once

#include "predictor/page.h"
#include "transport/memory.h"

namespace presync {

// Makes `run` zero without touching what is zero: holes are not even looked at, because that would
// give them memory. Precondition: memory.IsWithinOneRegion(run).
void ZeroRun(const GuestMemory& memory, PageRun run);

}  // namespace presync
