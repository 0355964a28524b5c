// The page of `presync report`.
#pragma once

#include <nlohmann/json.hpp>
#include <string>

#include "absl/time/time.h"

namespace presync {

// presyncd's answer to "report" as one HTML page that needs no network and runs nothing. What is
// missing or of another type than expected in `report` is left out of the page.
std::string RenderReportPage(const nlohmann::json& report, absl::Time made_at);

}  // namespace presync
