// Versions of the control conversation.
#pragma once

#include <cstdint>

namespace presync {

// 1: one TCP link, opened with the session. 2: links come and go within a conversation; RDMA.
// The newest this build speaks, and the oldest it still understands: its neighbour below, if there
// is one.
inline constexpr uint32_t kNewestProtocolVersion = 2;
inline constexpr uint32_t kOldestProtocolVersion = 1;

// From this version on links are opened by OpenLink.
inline constexpr uint32_t kLinksVersion = 2;

inline constexpr char kSoftware[] = "presync " PRESYNC_VERSION;

}  // namespace presync
