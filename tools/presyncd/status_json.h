// What presyncd tells of its sessions, as JSON. Field names are a promise to scripts:
// docs/protocol.md.
#pragma once

#include <nlohmann/json.hpp>

#include "absl/time/time.h"
#include "transport/sync/recovery.h"
#include "transport/sync/source_session.h"
#include "transport/sync/target_service.h"

namespace presync {

// Milliseconds; an infinite duration, "not known", is null.
nlohmann::json MillisToJson(absl::Duration duration);

nlohmann::json ComparisonToJson(const ComparisonReport& report);
nlohmann::json SourceStatusToJson(const SessionStatus& status);
nlohmann::json TargetStatusToJson(const TargetStatus& status);
nlohmann::json MatterToJson(const OpenMatter& matter);
nlohmann::json LaunchReportToJson(const HandoverReport& report, const SessionStatus& status);

}  // namespace presync
