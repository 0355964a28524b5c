// The command "verify".
#include <spdlog/spdlog.h>

#include <memory>
#include <string>

#include "tools/common/local_api.h"
#include "tools/presyncd/daemon.h"
#include "tools/presyncd/status_json.h"

namespace presync {

absl::StatusOr<nlohmann::json> Daemon::Verify(const nlohmann::json& request) {
  const std::string name = TextOr(request, "name", "");
  const absl::StatusOr<std::shared_ptr<SourceSession>> found = SessionOf(name);
  if (!found.ok()) return found.status();
  SourceSession* const session = found->get();
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
