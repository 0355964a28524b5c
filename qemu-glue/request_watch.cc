#include "qemu-glue/request_watch.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "transport/clock.h"

namespace presync {
namespace {

// Bounds of the histogram's bins: a factor of about 2 where a page's patience is decided
// (transport/ sync/unsettled_pages.cc), coarser below.
constexpr uint64_t kMs = 1'000'000;
constexpr uint64_t kBoundariesNs[] = {1 * kMs,     10 * kMs,    100 * kMs,  500 * kMs,
                                      1000 * kMs,  2000 * kMs,  4000 * kMs, 8000 * kMs,
                                      15000 * kMs, 30000 * kMs, 60000 * kMs};

std::vector<uint64_t> UintsAt(const Json& value, const char* key) {
  std::vector<uint64_t> uints;
  const Json* member = FindMember(value, key);
  if (member == nullptr || !member->is_array()) return uints;
  for (const Json& each : *member) {
    if (!each.is_number_unsigned()) return {};
    uints.push_back(*each.get_ptr<const uint64_t*>());
  }
  return uints;
}

}  // namespace

absl::StatusOr<RequestWatch::Reads> RequestWatch::ParseReads(const Json& stats) {
  const std::optional<uint64_t> total_ns = UintAt(stats, "rd_total_time_ns");
  const std::optional<uint64_t> failed = UintAt(stats, "failed_rd_operations");
  if (!total_ns || !failed) {
    return absl::InvalidArgumentError("query-blockstats: QEMU does not say how long reads took");
  }
  Reads reads = {.total_ns = *total_ns,
                 .failed = *failed,
                 .counts_failed = BoolAt(stats, "account_failed").value_or(false)};
  if (const Json* histogram = FindMember(stats, "rd_latency_histogram"); histogram != nullptr) {
    reads.boundaries_ns = UintsAt(*histogram, "boundaries");
    reads.bins = UintsAt(*histogram, "bins");
    if (reads.bins.size() != reads.boundaries_ns.size() + 1) reads.boundaries_ns = reads.bins = {};
  }
  return reads;
}

// A bound for each read that was counted in `after` and not in `before`.
absl::Duration RequestWatch::LongestBetween(const Reads& before, const Reads& after) {
  const bool uncounted = after.failed != before.failed && !after.counts_failed;
  if (after.total_ns < before.total_ns || uncounted) return absl::InfiniteDuration();
  uint64_t longest_ns = after.total_ns - before.total_ns;
  if (after.bins.empty()) return absl::Nanoseconds(longest_ns);
  // The sum alone would have everybody wait for what it may be made of.
  if (after.boundaries_ns != before.boundaries_ns) return absl::InfiniteDuration();
  // Bin i counts what took less than boundary i; the last has no bound.
  for (size_t i = after.bins.size(); i > 0; --i) {
    if (after.bins[i - 1] == before.bins[i - 1]) continue;
    if (i <= after.boundaries_ns.size()) {
      longest_ns = std::min(longest_ns, after.boundaries_ns[i - 1]);
    }
    break;
  }
  return absl::Nanoseconds(longest_ns);
}

// A device that is seen for the first time. Whether QEMU keeps the histogram is not vital.
absl::Status RequestWatch::Meet(QmpClient& qmp, const std::string& id, Device* device,
                                absl::Time deadline) {
  const absl::StatusOr<Json> type =
      qmp.Execute("qom-get", {{"path", id}, {"property", "type"}}, deadline);
  if (!type.ok() && !absl::IsFailedPrecondition(type.status())) return type.status();
  device->keeps_accounts = type.ok() && type->is_string() && *type != "scsi-generic";
  if (!device->reads.bins.empty()) return absl::OkStatus();
  const absl::Status kept =
      qmp.Execute("block-latency-histogram-set",
                  {{"id", id}, {"boundaries-read", Json(kBoundariesNs)}}, deadline)
          .status();
  device->histogram_is_ours = kept.ok();
  return absl::IsFailedPrecondition(kept) ? absl::OkStatus() : kept;
}

absl::StatusOr<RequestLook> RequestWatch::Look(QmpClient& qmp, absl::Time deadline) {
  RequestLook look = {.at = MonotonicNow(), .longest = absl::ZeroDuration()};
  const absl::StatusOr<Json> answer = qmp.Execute("query-blockstats", nullptr, deadline);
  if (!answer.ok()) return answer.status();
  if (!answer->is_array()) return absl::InvalidArgumentError("query-blockstats: not a list");
  std::map<std::string, Device> seen;
  for (const Json& entry : *answer) {
    const std::string id = StringAt(entry, "qdev");
    const Json* stats = FindMember(entry, "stats");
    if (id.empty() || stats == nullptr) continue;  // no device of the guest's uses it
    absl::StatusOr<Reads> reads = ParseReads(*stats);
    if (!reads.ok()) return reads.status();
    const auto known = devices_.find(id);
    Device device = known != devices_.end() ? known->second : Device{};
    const Reads before = std::exchange(device.reads, *std::move(reads));
    if (known == devices_.end()) {
      if (absl::Status s = Meet(qmp, id, &device, deadline); !s.ok()) return s;
    }
    look.longest =
        std::max(look.longest, device.keeps_accounts ? LongestBetween(before, device.reads)
                                                     : absl::InfiniteDuration());
    seen.emplace(id, std::move(device));
  }
  for (const auto& [id, device] : devices_) {
    if (!seen.contains(id)) look.longest = absl::InfiniteDuration();  // gone, with its accounts
  }
  devices_ = std::move(seen);
  if (!std::exchange(looked_, true)) look.longest = absl::InfiniteDuration();
  return look;
}

void RequestWatch::Undo(QmpClient& qmp) {
  for (const auto& [id, device] : devices_) {
    if (!device.histogram_is_ours) continue;
    // One that QEMU keeps for reads alone can only be dropped together with all others.
    qmp.Post("block-latency-histogram-set", {{"id", id}}, MonotonicNow() + absl::Seconds(1))
        .IgnoreError();
  }
  devices_.clear();
}

}  // namespace presync
