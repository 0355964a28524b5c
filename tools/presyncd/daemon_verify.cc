// The command "verify".
#include <spdlog/spdlog.h>

#include <string>

#include "absl/strings/str_cat.h"
#include "tools/common/local_api.h"
#include "tools/presyncd/daemon.h"
#include "tools/presyncd/status_json.h"

namespace presync {

absl::StatusOr<nlohmann::json> Daemon::Verify(const nlohmann::json& request) {
  const std::string name = TextOr(request, "name", "");
  const std::shared_ptr<SourceSession> session = Find(name);
  if (session == nullptr) {
    return absl::NotFoundError(
        absl::StrCat(name, " is not kept in sync from this host; presync start ", name, " first"));
  }
  const absl::StatusOr<ComparisonReport> report = session->Verify();
  if (!report.ok()) return report.status();
  spdlog::info("{}: compared with {}: {} pages, {} differ; {} were being written or sent", name,
               session->status().peer, report->compared, report->differing, report->aside);
  nlohmann::json answer = ComparisonToJson(*report);
  answer["name"] = name;
  answer["to"] = session->status().peer;
  answer["hash_bytes"] = report->hash_bytes;
  return answer;
}

}  // namespace presync
