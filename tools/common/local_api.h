// What `presync` and `presyncd` of one host say to each other: one line of JSON each way over a
// unix socket. docs/protocol.md, "The local socket", lists the commands.
#pragma once

#include <atomic>
#include <nlohmann/json.hpp>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"

namespace presync {

// Longest line either side accepts.
inline constexpr size_t kMaxLocalLineBytes = 1 << 20;

// Sends one request and waits for its answer. UNAVAILABLE: presyncd does not run here, or the
// socket is not for this user, with what to do; else the error that presyncd answered with.
// CANCELLED: `interrupted` was set, if it is not null, while the answer was waited for; what was
// asked for goes on.
absl::StatusOr<nlohmann::json> CallLocal(const std::string& socket_path,
                                         const nlohmann::json& request, absl::Time deadline,
                                         const std::atomic<bool>* interrupted = nullptr);

// {"ok": false, "code": ..., "error": ...} and back.
nlohmann::json StatusToJson(const absl::Status& status);
absl::Status JsonToStatus(const nlohmann::json& answer);

// Writes `json` and a newline, or reads up to a newline. UNAVAILABLE, DEADLINE_EXCEEDED;
// INVALID_ARGUMENT: too long, or not a JSON object. CANCELLED: as CallLocal.
absl::Status WriteJsonLine(int fd, const nlohmann::json& json);
absl::StatusOr<nlohmann::json> ReadJsonLine(int fd, absl::Time deadline,
                                            const std::atomic<bool>* interrupted = nullptr);

// A numeric or string member, or a default: what the other side wrote is not trusted for its types.
int64_t NumberOr(const nlohmann::json& object, const char* key, int64_t fallback);
std::string TextOr(const nlohmann::json& object, const char* key, const std::string& fallback);
bool FlagOr(const nlohmann::json& object, const char* key, bool fallback);

}  // namespace presync
