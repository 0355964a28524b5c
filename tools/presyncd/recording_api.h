// The local socket's command "record": docs/protocol.md, "record".
#pragma once

#include <nlohmann/json.hpp>

#include "absl/status/statusor.h"
#include "predictor/page.h"
#include "transport/sync/session_recording.h"

namespace presync {

// Answers one "record" request about a guest of `pages` pages. INVALID_ARGUMENT: no such action;
// else the errors of SessionRecording.
absl::StatusOr<nlohmann::json> AnswerRecord(SessionRecording* recording, PageCount pages,
                                            const nlohmann::json& request);

}  // namespace presync
