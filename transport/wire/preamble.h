// The first bytes of every connection to presyncd's port say what it is for. Fixed 32 bytes,
// little-endian, before any other message and in this direction only:
//
//   offset  size  field
//        0     8  magic "PRESYNC1"
//        8     4  kind: 1 control, 2 data
//       12     4  stream: index of a data stream, 0 for control
//       16    16  token of the session a data stream belongs to, zero for control
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

#include "absl/status/statusor.h"
#include "absl/types/span.h"

namespace presync {

inline constexpr size_t kPreambleBytes = 32;
using SessionToken = std::array<uint8_t, 16>;

struct Preamble {
  enum class Kind : uint32_t { kControl = 1, kData = 2 };
  Kind kind = Kind::kControl;
  uint32_t stream = 0;
  SessionToken token = {};
};

std::array<uint8_t, kPreambleBytes> EncodePreamble(const Preamble& preamble);

// INVALID_ARGUMENT: not a preamble. Never reads past `bytes`.
absl::StatusOr<Preamble> DecodePreamble(absl::Span<const uint8_t> bytes);

}  // namespace presync
