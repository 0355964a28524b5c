// Names for one `presync start`, over all its reconnects.
#pragma once

#include <array>
#include <cstdint>
#include <string>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"

namespace presync {

using SessionId = std::array<uint8_t, 16>;

// 16 bytes from the kernel's random source: for session ids, and for tokens that nobody may guess.
SessionId RandomId();

// 32 lower-case hexadecimal digits.
std::string IdToHex(const SessionId& id);

// INVALID_ARGUMENT: not 16 bytes (for bytes as they come over the wire), or not 32 digits.
absl::StatusOr<SessionId> IdFromBytes(absl::string_view bytes);
absl::StatusOr<SessionId> IdFromHex(absl::string_view hex);
std::string IdToBytes(const SessionId& id);

}  // namespace presync
