#include "tools/presyncd/status_json.h"

#include "transport/clock.h"

namespace presync {

using Json = nlohmann::json;

Json MillisToJson(absl::Duration duration) {
  if (duration == absl::InfiniteDuration()) return nullptr;
  return absl::ToDoubleMilliseconds(duration);
}

Json ComparisonToJson(const ComparisonReport& report) {
  return {{"pages_compared", report.compared},
          {"pages_aside", report.aside},
          {"pages_repaired", report.repaired},
          {"pages_differing", report.differing},
          {"differing", report.named}};
}

namespace {

// Seconds since 1970, of a monotonic time; null: never.
Json TimeToJson(absl::Time time) {
  if (time == absl::InfinitePast()) return nullptr;
  return absl::ToDoubleSeconds(ToWallTime(time) - absl::UnixEpoch());
}

Json ResumptionToJson(const ResumptionStatus& status) {
  return {{"count", status.count},
          {"from", status.count == 0 ? "" : std::string(ResumedFromName(status.from))},
          {"at", TimeToJson(status.at)},
          {"stale_pages", status.stale_pages},
          {"wire_bytes", status.wire_bytes},
          {"hash_bytes", status.hash_bytes},
          {"caught_up", status.caught_up}};
}

Json AuditToJson(const ComparisonStatus& status) {
  Json audit = ComparisonToJson(status.audit);
  audit["audits"] = status.audits;
  audit["ended_at"] = TimeToJson(status.audited_at);
  return audit;
}

}  // namespace

Json SourceStatusToJson(const SessionStatus& status) {
  const SyncProgress& p = status.progress;
  const ComparisonStatus& c = status.comparisons;
  // A sync that is over promises nothing.
  const bool over = IsOver(status.state);
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
          {"launchable", status.launchable && !over},
          {"warnings", status.warnings},
          {"uptime_s", absl::ToDoubleSeconds(status.uptime)},
          {"reconnects", status.reconnects},
          {"max_launch_ms", MillisToJson(status.promise)},
          {"fixed_cost_ms", MillisToJson(status.fixed_cost)},
          {"predicted_launch_ms", over ? Json() : MillisToJson(p.predicted_launch)},
          {"pages", p.pages},
          {"residual_pages", p.residual},
          {"set_point_pages", p.set_point},
          {"unsettled_pages", p.unsettled},
          {"first_pass_done", p.first_pass_done},
          {"rate_bytes_per_s", p.rate_bytes_per_s},
          {"allowed_bytes_per_s", p.allowed_bytes_per_s},
          {"link_bytes_per_s", p.link_bytes_per_s},
          {"wire_bytes", p.wire_bytes},
          {"pages_sent", p.pages_sent},
          {"pages_zero", p.pages_zero},
          {"write_faults", p.write_faults},
          {"dirty_pages_per_s", p.dirty_pages_per_s},
          {"pages_compared", c.pages_compared},
          {"pages_repaired", c.pages_repaired},
          {"pages_differing", c.pages_differing},
          {"hash_bytes", c.hash_bytes},
          {"audit", AuditToJson(c)},
          {"proving", c.proving},
          {"pages_proven", c.proof.compared},
          {"resumption", ResumptionToJson(status.resumption)},
          {"resent_bytes", status.resumption.all_bytes}};
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
          {"unsettled_pages", report.unsettled_pages},
          {"unsettled_differing", report.unsettled_differing},
          {"unsettled_ms", MillisToJson(report.unsettled_took)},
          {"pages_compared", report.pages_compared},
          {"pages_differing", report.pages_differing},
          {"steps", std::move(steps)}};
}

}  // namespace presync
