// The local socket's command "record": docs/protocol.md, "record".
#pragma once

#include <nlohmann/json.hpp>

#include "absl/status/statusor.h"
#include "transport/sync/source_session.h"

namespace presync {

// Answers one "record" request about `session`. INVALID_ARGUMENT: no such action; else the errors
// of SessionRecording.
absl::StatusOr<nlohmann::json> AnswerRecord(SourceSession* session, const nlohmann::json& request);

}  // namespace presync
