#include "transport/sync/session_id.h"

#include <sys/random.h>

#include <algorithm>
#include <cctype>

#include "absl/strings/escaping.h"
#include "predictor/check.h"

namespace presync {

SessionId RandomId() {
  SessionId id;
  PRESYNC_CHECK(::getrandom(id.data(), id.size(), 0) == static_cast<ssize_t>(id.size()));
  return id;
}

std::string IdToBytes(const SessionId& id) { return std::string(id.begin(), id.end()); }

std::string IdToHex(const SessionId& id) { return absl::BytesToHexString(IdToBytes(id)); }

absl::StatusOr<SessionId> IdFromBytes(absl::string_view bytes) {
  SessionId id;
  if (bytes.size() != id.size()) return absl::InvalidArgumentError("a session id has 16 bytes");
  std::copy(bytes.begin(), bytes.end(), id.begin());
  return id;
}

absl::StatusOr<SessionId> IdFromHex(absl::string_view hex) {
  const bool digits =
      std::all_of(hex.begin(), hex.end(), [](unsigned char c) { return std::isxdigit(c) != 0; });
  if (hex.size() != 32 || !digits) {
    return absl::InvalidArgumentError("a session id has 32 hexadecimal digits");
  }
  return IdFromBytes(absl::HexStringToBytes(hex));
}

}  // namespace presync
