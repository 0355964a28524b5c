#include "transport/sync/session_id.h"

#include <sys/random.h>

#include <algorithm>
#include <charconv>
#include <system_error>

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
  SessionId id;
  bool good = hex.size() == 2 * id.size();
  for (size_t i = 0; good && i < id.size(); ++i) {
    const char* const digits = hex.data() + 2 * i;
    const auto [end, error] = std::from_chars(digits, digits + 2, id[i], 16);
    good = error == std::errc() && end == digits + 2;
  }
  if (!good) return absl::InvalidArgumentError("a session id has 32 hexadecimal digits");
  return id;
}

}  // namespace presync
