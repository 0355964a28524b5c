// Versions of the control conversation.
#pragma once

#include <cstdint>

namespace presync {

// The newest this build speaks, and the oldest it still understands: its neighbour below, if there
// is one.
inline constexpr uint32_t kNewestProtocolVersion = 1;
inline constexpr uint32_t kOldestProtocolVersion = 1;

inline constexpr char kSoftware[] = "presync " PRESYNC_VERSION;

}  // namespace presync
