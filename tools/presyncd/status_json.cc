#include "tools/presyncd/status_json.h"

namespace presync {

using Json = nlohmann::json;

Json MillisToJson(absl::Duration duration) {
  if (duration == absl::InfiniteDuration()) return nullptr;
  return absl::ToDoubleMilliseconds(duration);
}

Json SourceStatusToJson(const SessionStatus& status) {
  const SyncProgress& p = status.progress;
  return {{"name", status.guest},
          {"qmp", status.guest_address},
          {"session", status.session},
          {"state", std::string(StateName(status.state))},
          {"to", status.peer},
          {"link", status.link},
          {"link_devices", status.link_devices},
          {"link_reason", status.link_reason},
          {"dirty_log", status.dirty_log},
          {"problem", status.problem},
          {"uptime_s", absl::ToDoubleSeconds(status.uptime)},
          {"reconnects", status.reconnects},
          {"max_launch_ms", MillisToJson(status.promise)},
          {"fixed_cost_ms", MillisToJson(status.fixed_cost)},
          {"predicted_launch_ms", MillisToJson(p.predicted_launch)},
          {"pages", p.pages},
          {"residual_pages", p.residual},
          {"set_point_pages", p.set_point},
          {"first_pass_done", p.first_pass_done},
          {"rate_bytes_per_s", p.rate_bytes_per_s},
          {"allowed_bytes_per_s", p.allowed_bytes_per_s},
          {"link_bytes_per_s", p.link_bytes_per_s},
          {"wire_bytes", p.wire_bytes},
          {"pages_sent", p.pages_sent},
          {"pages_zero", p.pages_zero},
          {"write_faults", p.write_faults},
          {"dirty_pages_per_s", p.dirty_pages_per_s}};
}

Json TargetStatusToJson(const TargetStatus& status) {
  return {{"name", status.guest},
          {"session", status.session},
          {"from", status.peer},
          {"certificate", status.peer_name},
          {"state", status.state}};
}

Json MatterToJson(const OpenMatter& matter) {
  const HandoverEntry& entry = matter.entry;
  return {{"name", entry.guest},
          {"session", entry.guest.empty() ? "" : IdToHex(entry.session)},
          {"role", entry.role == HandoverRole::kSource ? "source" : "target"},
          {"phase", entry.guest.empty() ? "" : std::string(PhaseName(entry.phase))},
          {"peer", entry.peer},
          {"record", matter.path},
          {"known", matter.known},
          {"advice", matter.advice},
          {"for_a_person", matter.for_a_person}};
}

Json LaunchReportToJson(const HandoverReport& report, const SessionStatus& status) {
  Json steps = Json::array();
  for (const auto& [step, at] : report.steps)
    steps.push_back({{"step", step}, {"ms", MillisToJson(at)}});
  return {{"name", status.guest},
          {"to", status.peer},
          {"launch_ms", MillisToJson(report.launch)},
          {"downtime_ms", MillisToJson(report.downtime)},
          {"residual_pages", report.residual_at_launch},
          {"residual_pages_at_stop", report.residual_at_stop},
          {"rounds", report.rounds},
          {"state_bytes", report.state_bytes},
          {"bytes_before_launch", status.progress.wire_bytes - report.wire_bytes},
          {"bytes_after_launch", report.wire_bytes + report.state_bytes},
          {"pages_compared", report.pages_compared},
          {"pages_differing", report.pages_differing},
          {"steps", std::move(steps)}};
}

}  // namespace presync
