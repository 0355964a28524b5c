#include "tools/presyncd/metrics.h"

#include <prometheus/exposer.h>

#include <algorithm>
#include <exception>
#include <limits>

#include "absl/strings/str_cat.h"
#include "predictor/page.h"
#include "transport/clock.h"

namespace presync {
namespace {

using prometheus::ClientMetric;
using prometheus::MetricFamily;
using prometheus::MetricType;

constexpr SessionState kStates[] = {
    SessionState::kConnecting, SessionState::kFirstPass, SessionState::kSyncing,
    SessionState::kLaunching,  SessionState::kMoved,     SessionState::kStuck,
    SessionState::kInDoubt,    SessionState::kFailed,    SessionState::kStopped};

using Labels = std::vector<ClientMetric::Label>;

void Add(MetricFamily* family, double value, Labels labels) {
  ClientMetric metric;
  metric.label = std::move(labels);
  (family->type == MetricType::Counter ? metric.counter.value : metric.gauge.value) = value;
  family->metric.push_back(std::move(metric));
}

MetricFamily Family(const char* name, const char* help, MetricType type) {
  MetricFamily family;
  family.name = name;
  family.help = help;
  family.type = type;
  return family;
}

void AddSingle(std::vector<MetricFamily>* out, const char* name, const char* help, double value,
               Labels labels = {}) {
  out->push_back(Family(name, help, MetricType::Gauge));
  Add(&out->back(), value, std::move(labels));
}

double Bytes(PageCount pages) { return static_cast<double>(PagesToBytes(pages)); }

// One number of each guest; infinite is "not known", and left out.
struct GuestNumber {
  const char* name;
  const char* help;
  MetricType type;
  double (*value)(const SessionStatus&);
};

constexpr GuestNumber kGuestNumbers[] = {
    {"presync_guest_memory_bytes", "Size of the guest's memory.", MetricType::Gauge,
     [](const SessionStatus& s) { return Bytes(s.progress.pages); }},
    {"presync_guest_residual_bytes", "Memory that a launch now would still have to move.",
     MetricType::Gauge, [](const SessionStatus& s) { return Bytes(s.progress.residual); }},
    {"presync_guest_set_point_bytes", "Residual that the promise leaves room for.",
     MetricType::Gauge, [](const SessionStatus& s) { return Bytes(s.progress.set_point); }},
    {"presync_guest_predicted_launch_seconds",
     "What a launch now would take; absent while it is not known.", MetricType::Gauge,
     [](const SessionStatus& s) { return absl::ToDoubleSeconds(s.progress.predicted_launch); }},
    {"presync_guest_launchable",
     "1 unless something about the guest or its target would have a launch refused.",
     MetricType::Gauge, [](const SessionStatus& s) { return s.launchable ? 1.0 : 0.0; }},
    {"presync_guest_promised_launch_seconds", "What a launch may take.", MetricType::Gauge,
     [](const SessionStatus& s) { return absl::ToDoubleSeconds(s.promise); }},
    {"presync_guest_fixed_cost_seconds", "What a launch takes besides moving memory.",
     MetricType::Gauge, [](const SessionStatus& s) { return absl::ToDoubleSeconds(s.fixed_cost); }},
    {"presync_guest_wire_bytes_per_second", "Rate at which memory is sent.", MetricType::Gauge,
     [](const SessionStatus& s) { return static_cast<double>(s.progress.rate_bytes_per_s); }},
    {"presync_guest_link_bytes_per_second", "What the link carries, as measured; 0: not yet.",
     MetricType::Gauge,
     [](const SessionStatus& s) { return static_cast<double>(s.progress.link_bytes_per_s); }},
    {"presync_guest_written_pages_per_second", "Pages that the guest was seen to write.",
     MetricType::Gauge, [](const SessionStatus& s) { return s.progress.dirty_pages_per_s; }},
    {"presync_guest_uptime_seconds", "Since the sync was started.", MetricType::Gauge,
     [](const SessionStatus& s) { return absl::ToDoubleSeconds(s.uptime); }},
    {"presync_guest_wire_bytes_total", "Bytes sent, as on the wire.", MetricType::Counter,
     [](const SessionStatus& s) { return static_cast<double>(s.progress.wire_bytes); }},
    {"presync_guest_pages_sent_total", "Pages sent with their content.", MetricType::Counter,
     [](const SessionStatus& s) { return static_cast<double>(s.progress.pages_sent); }},
    {"presync_guest_write_faults_total",
     "Write faults that tracking caused in the guest, about 2 to 6 us each.", MetricType::Counter,
     [](const SessionStatus& s) { return static_cast<double>(s.progress.write_faults); }},
    {"presync_guest_compared_pages_total", "Pages compared by hash while the guest ran.",
     MetricType::Counter,
     [](const SessionStatus& s) { return static_cast<double>(s.comparisons.pages_compared); }},
    {"presync_guest_differing_pages_total",
     "Of these, pages that differed though nobody was seen to write them.", MetricType::Counter,
     [](const SessionStatus& s) { return static_cast<double>(s.comparisons.pages_differing); }},
    {"presync_guest_unsettled_pages",
     "Pages that a launch would compare, since a read of a device may have been filling them.",
     MetricType::Gauge,
     [](const SessionStatus& s) { return static_cast<double>(s.progress.unsettled); }},
    {"presync_guest_repaired_pages_total",
     "Pages that a read of a device changed after they were sent, unseen; sent again.",
     MetricType::Counter,
     [](const SessionStatus& s) { return static_cast<double>(s.comparisons.pages_repaired); }},
    {"presync_guest_audited_timestamp_seconds",
     "When the audit last ended a walk through all memory; absent before the first.",
     MetricType::Gauge,
     [](const SessionStatus& s) {
       return s.comparisons.audits == 0
                  ? std::numeric_limits<double>::infinity()
                  : absl::ToDoubleSeconds(ToWallTime(s.comparisons.audited_at) - absl::UnixEpoch());
     }},
    {"presync_guest_hash_bytes_total", "Bytes of hashes on the control connection, both ways.",
     MetricType::Counter,
     [](const SessionStatus& s) { return static_cast<double>(s.comparisons.hash_bytes); }},
    {"presync_guest_resent_bytes_total",
     "Bytes, hashes included, that going on after lost links and restarts took.",
     MetricType::Counter,
     [](const SessionStatus& s) { return static_cast<double>(s.resumption.all_bytes); }},
    {"presync_guest_reconnects_total", "Times that the link was lost and came back.",
     MetricType::Counter, [](const SessionStatus& s) { return static_cast<double>(s.reconnects); }},
};

void AppendGuests(const std::vector<SessionStatus>& guests, std::vector<MetricFamily>* out) {
  for (const GuestNumber& number : kGuestNumbers) {
    MetricFamily family = Family(number.name, number.help, number.type);
    for (const SessionStatus& guest : guests) {
      const double value = number.value(guest);
      if (value < std::numeric_limits<double>::infinity()) {
        Add(&family, value, {{"guest", guest.guest}});
      }
    }
    out->push_back(std::move(family));
  }
  MetricFamily state =
      Family("presync_guest_state", "1 for the state that the sync is in.", MetricType::Gauge);
  MetricFamily link =
      Family("presync_guest_link", "1 for the link that carries the sync.", MetricType::Gauge);
  for (const SessionStatus& guest : guests) {
    for (const SessionState each : kStates) {
      Add(&state, guest.state == each ? 1 : 0,
          {{"guest", guest.guest}, {"state", std::string(StateName(each))}});
    }
    for (const char* each : {"rdma", "tcp"}) {
      Add(&link, guest.link == each ? 1 : 0, {{"guest", guest.guest}, {"link", each}});
    }
  }
  out->push_back(std::move(state));
  out->push_back(std::move(link));
}

}  // namespace

void Metrics::NoteLink(const SessionStatus& status) {
  if (status.link.empty()) return;  // lost, and not back yet
  MutexLock lock(&mutex_);
  if (link_.size() >= kMostGuests && !link_.contains(status.guest)) return;
  std::string* last = &link_[status.guest];
  uint64_t* falls = &link_falls_[status.guest];
  if (*last == "rdma" && status.link == "tcp") ++*falls;
  *last = status.link;
}

void Metrics::Add(absl::Duration time, Times* times) {
  const double seconds = absl::ToDoubleSeconds(time);
  times->sum += seconds;
  ++times->count;
  for (size_t i = 0; i < kBuckets.size(); ++i) {
    if (seconds > kBuckets[i]) continue;
    ++times->buckets[i];
    return;
  }
}

void Metrics::NoteLaunch(const absl::StatusOr<HandoverReport>& report) {
  MutexLock lock(&mutex_);
  if (!report.ok()) {
    ++launches_failed_;
    return;
  }
  ++launches_moved_;
  if (report->launch <= absl::ZeroDuration()) return;  // its end was only heard of later
  Add(report->launch, &launch_);
  Add(report->downtime, &downtime_);
}

void Metrics::NoteError(const std::string& command, absl::StatusCode code) {
  MutexLock lock(&mutex_);
  ++errors_[{command, absl::StatusCodeToString(code)}];
}

MetricFamily Metrics::Histogram(const char* name, const char* help, const Times& times) {
  MetricFamily family = Family(name, help, MetricType::Histogram);
  ClientMetric metric;
  metric.histogram.sample_count = times.count;
  metric.histogram.sample_sum = times.sum;
  uint64_t below = 0;
  for (size_t i = 0; i < kBuckets.size(); ++i) {
    ClientMetric::Bucket bucket;
    bucket.cumulative_count = below += times.buckets[i];
    bucket.upper_bound = kBuckets[i];
    metric.histogram.bucket.push_back(bucket);
  }
  ClientMetric::Bucket rest;
  rest.cumulative_count = times.count;
  rest.upper_bound = std::numeric_limits<double>::infinity();
  metric.histogram.bucket.push_back(rest);
  family.metric.push_back(std::move(metric));
  return family;
}

void Metrics::AppendCounts(std::vector<MetricFamily>* out) const {
  MutexLock lock(&mutex_);
  MetricFamily falls = Family("presync_guest_link_falls_total",
                              "Times that a sync fell from RDMA to TCP.", MetricType::Counter);
  for (const auto& [guest, count] : link_falls_) {
    presync::Add(&falls, static_cast<double>(count), {{"guest", guest}});
  }
  out->push_back(std::move(falls));
  MetricFamily launches =
      Family("presync_launches_total", "Launches from this host, by result.", MetricType::Counter);
  presync::Add(&launches, static_cast<double>(launches_moved_), {{"result", "moved"}});
  presync::Add(&launches, static_cast<double>(launches_failed_), {{"result", "failed"}});
  out->push_back(std::move(launches));
  out->push_back(Histogram("presync_launch_seconds",
                           "Order to launch until the guest ran on the target.", launch_));
  out->push_back(Histogram("presync_launch_downtime_seconds",
                           "Guest stopped until it ran on the target.", downtime_));
  MetricFamily errors = Family("presync_command_errors_total",
                               "Commands that were refused or failed.", MetricType::Counter);
  for (const auto& [key, count] : errors_) {
    presync::Add(&errors, static_cast<double>(count),
                 {{"command", key.first}, {"code", key.second}});
  }
  out->push_back(std::move(errors));
}

std::vector<MetricFamily> Metrics::Collect() const {
  View view = look_();
  std::vector<MetricFamily> out;
  AddSingle(&out, "presync_build_info", "1; the version is a label.", 1,
            {{"version", PRESYNC_VERSION}});
  MetricFamily guests =
      Family("presync_guests", "Guests in sync, by direction.", MetricType::Gauge);
  presync::Add(&guests, static_cast<double>(view.sources.size()), {{"direction", "outgoing"}});
  presync::Add(&guests, static_cast<double>(view.incoming), {{"direction", "incoming"}});
  out.push_back(std::move(guests));
  AddSingle(&out, "presync_open_matters",
            "Handovers that could not be settled after a restart; presync status names them.",
            static_cast<double>(view.open_matters));
  const size_t shown = std::min(view.sources.size(), kMostGuests);
  AddSingle(&out, "presync_guests_not_shown", "Guests without series of their own.",
            static_cast<double>(view.sources.size() - shown));
  view.sources.resize(shown);
  AppendGuests(view.sources, &out);
  AppendCounts(&out);
  return out;
}

absl::StatusOr<std::unique_ptr<MetricsServer>> MetricsServer::Start(
    const std::string& address, std::shared_ptr<Metrics> metrics) {
  try {  // the library's only way to say that it can't listen
    auto exposer = std::make_unique<prometheus::Exposer>(address);
    exposer->RegisterCollectable(metrics);
    return std::unique_ptr<MetricsServer>(
        new MetricsServer(std::move(exposer), std::move(metrics)));
  } catch (const std::exception& error) {
    return absl::UnavailableError(absl::StrCat("metrics: can't listen at ", address, ": ",
                                               error.what(),
                                               "; is the address this host's, and the port free?"));
  }
}

MetricsServer::MetricsServer(std::unique_ptr<prometheus::Exposer> exposer,
                             std::shared_ptr<Metrics> metrics)
    : metrics_(std::move(metrics)), exposer_(std::move(exposer)) {}

MetricsServer::~MetricsServer() = default;

}  // namespace presync
