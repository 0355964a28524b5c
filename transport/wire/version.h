// Versions of the control conversation.
#pragma once

#include <cstdint>

namespace presync {

// 1: one TCP link, opened with the session. 2: links come and go within a conversation; RDMA.
// 3: hashes while the guest runs, and with them older copies that are taken up. 4: guests that
// libvirt manages.
// The newest this build speaks, and the oldest it still understands: its neighbour below at least.
inline constexpr uint32_t kNewestProtocolVersion = 4;
inline constexpr uint32_t kOldestProtocolVersion = 1;

// From this version on links are opened by OpenLink.
inline constexpr uint32_t kLinksVersion = 2;
// From this version on the target hashes while the guest runs, and offers older copies.
inline constexpr uint32_t kHashesVersion = 3;
// From this version on a session may be about a libvirt domain.
inline constexpr uint32_t kDomainVersion = 4;

inline constexpr char kSoftware[] = "presync " PRESYNC_VERSION;

}  // namespace presync
