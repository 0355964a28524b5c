#include "tools/presyncd/history.h"

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "tools/presyncd/status_json.h"
#include "transport/clock.h"

namespace presync {
namespace {

using Json = nlohmann::json;

double UnixSeconds(absl::Time monotonic) {
  return absl::ToDoubleSeconds(ToWallTime(monotonic) - absl::UnixEpoch());
}

// Nothing changes any more.
bool Over(SessionState state) {
  return state == SessionState::kMoved || state == SessionState::kFailed ||
         state == SessionState::kStopped;
}

}  // namespace

History::Guest* History::Find(const SessionStatus& status, absl::Time now) {
  const bool known = guests_.contains(status.guest);
  if (!known && guests_.size() >= kMostGuests) {
    guests_.erase(std::min_element(
        guests_.begin(), guests_.end(),
        [](const auto& a, const auto& b) { return a.second.seen < b.second.seen; }));
  }
  Guest* guest = &guests_[status.guest];
  if (!known || guest->newest.session != status.session) {
    guest->points.clear();
    guest->stride = 1;
    guest->since = now - status.uptime;
  }
  return guest;
}

void History::Sample(const SessionStatus& status, absl::Time now) {
  MutexLock lock(&mutex_);
  Guest* guest = Find(status, now);
  const bool same = !guest->points.empty() && guest->newest.state == status.state &&
                    guest->newest.link == status.link &&
                    guest->newest.comparisons.pages_differing == status.comparisons.pages_differing;
  guest->newest = status;
  guest->seen = now;
  if (same && (Over(status.state) || ++guest->skipped < guest->stride)) return;
  guest->skipped = 0;
  const SyncProgress& p = status.progress;
  guest->points.push_back({.at = now,
                           .state = StateName(status.state),
                           .link = status.link,
                           .residual = p.residual,
                           .set_point = p.set_point,
                           .wire_bytes = p.wire_bytes,
                           .pages_differing = status.comparisons.pages_differing,
                           .resent_bytes = status.resumption.all_bytes,
                           .predicted_launch = p.predicted_launch,
                           .dirty_pages_per_s = p.dirty_pages_per_s});
  if (guest->points.size() < kMostSamples) return;
  size_t kept = 0;  // the even ones, and the newest
  for (size_t i = 0; i < guest->points.size(); ++i) {
    if (i % 2 == 0 || i + 1 == guest->points.size()) guest->points[kept++] = guest->points[i];
  }
  guest->points.resize(kept);
  guest->stride *= 2;
}

void History::NoteLaunch(const SessionStatus& status, absl::Time ordered_at,
                         const absl::StatusOr<HandoverReport>& report) {
  Json launch = report.ok() ? LaunchReportToJson(*report, status) : Json::object();
  if (!report.ok()) launch["error"] = std::string(report.status().message());
  launch["ordered_at"] = UnixSeconds(ordered_at);
  launch["promised_ms"] = MillisToJson(status.promise);
  MutexLock lock(&mutex_);
  std::deque<Json>* launches = &Find(status, MonotonicNow())->launches;
  launches->push_back(std::move(launch));
  if (launches->size() > kMostLaunches) launches->pop_front();
}

absl::StatusOr<Json> History::Report(const std::string& name) const {
  MutexLock lock(&mutex_);
  const auto it = guests_.find(name);
  if (it == guests_.end()) {
    return absl::NotFoundError(
        absl::StrCat(name, " was not kept in sync from this host since its presyncd started"));
  }
  const Guest& guest = it->second;
  Json answer = SourceStatusToJson(guest.newest);
  answer["since"] = UnixSeconds(guest.since);
  answer["samples"] = Json::array();
  for (const Point& point : guest.points) {
    answer["samples"].push_back({{"t", absl::ToDoubleSeconds(point.at - guest.since)},
                                 {"state", std::string(point.state)},
                                 {"link", point.link},
                                 {"residual_pages", point.residual},
                                 {"set_point_pages", point.set_point},
                                 {"wire_bytes", point.wire_bytes},
                                 {"pages_differing", point.pages_differing},
                                 {"resent_bytes", point.resent_bytes},
                                 {"predicted_launch_ms", MillisToJson(point.predicted_launch)},
                                 {"dirty_pages_per_s", point.dirty_pages_per_s}});
  }
  answer["launches"] = Json(std::vector<Json>(guest.launches.begin(), guest.launches.end()));
  return answer;
}

}  // namespace presync
