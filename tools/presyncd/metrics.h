// What presyncd tells Prometheus. docs/operations.md lists the metrics, tools/monitoring has alert
// rules and a dashboard that use them.
#pragma once

#include <prometheus/collectable.h>
#include <prometheus/metric_family.h>

#include <array>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/statusor.h"
#include "tools/presyncd/config.h"
#include "transport/mutex.h"
#include "transport/sync/source_session.h"

namespace prometheus {
class Exposer;
}

namespace presync {

// Thread-safe.
class Metrics final : public prometheus::Collectable {
 public:
  // More guests than these are not shown one by one; presync_guests_not_shown says how many.
  static constexpr size_t kMostGuests = 1000;

  struct View {
    std::vector<SessionStatus> sources;
    size_t incoming = 0;
    size_t open_matters = 0;
  };
  // `look` is called for each scrape, from the server's threads.
  explicit Metrics(std::function<View()> look) : look_(std::move(look)) {}

  // Call it about once a second for each sync: sees falls from RDMA to TCP.
  void NoteLink(const SessionStatus& status) ABSL_LOCKS_EXCLUDED(mutex_);
  void NoteLaunch(const absl::StatusOr<HandoverReport>& report) ABSL_LOCKS_EXCLUDED(mutex_);
  // A command of the local socket was refused or failed. `command` is one of a fixed few.
  void NoteError(const std::string& command, absl::StatusCode code) ABSL_LOCKS_EXCLUDED(mutex_);

  std::vector<prometheus::MetricFamily> Collect() const override;

 private:
  // Upper bounds in seconds; a launch takes about 40 ms at the least (docs/operations.md).
  static constexpr std::array kBuckets = {0.025, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5, 10.0};
  struct Times {
    std::array<uint64_t, kBuckets.size()> buckets = {};  // each on its own, not cumulated
    uint64_t count = 0;
    double sum = 0;
  };
  static void Add(absl::Duration time, Times* times);
  static prometheus::MetricFamily Histogram(const char* name, const char* help, const Times& times);
  void AppendCounts(std::vector<prometheus::MetricFamily>* out) const ABSL_LOCKS_EXCLUDED(mutex_);

  const std::function<View()> look_;
  mutable Mutex mutex_;
  std::map<std::string, std::string> link_ ABSL_GUARDED_BY(mutex_);     // guest: the last one
  std::map<std::string, uint64_t> link_falls_ ABSL_GUARDED_BY(mutex_);  // guest: rdma to tcp
  uint64_t launches_moved_ ABSL_GUARDED_BY(mutex_) = 0;
  uint64_t launches_failed_ ABSL_GUARDED_BY(mutex_) = 0;
  Times launch_ ABSL_GUARDED_BY(mutex_);
  Times downtime_ ABSL_GUARDED_BY(mutex_);
  std::map<std::pair<std::string, std::string>, uint64_t> errors_ ABSL_GUARDED_BY(mutex_);
};

// Serves /metrics over HTTP until it goes.
class MetricsServer {
 public:
  // `address`: HOST:PORT, as the configuration has it. UNAVAILABLE: can't listen there.
  static absl::StatusOr<std::unique_ptr<MetricsServer>> Start(const std::string& address,
                                                              std::shared_ptr<Metrics> metrics);
  ~MetricsServer();

 private:
  MetricsServer(std::unique_ptr<prometheus::Exposer> exposer, std::shared_ptr<Metrics> metrics);

  const std::shared_ptr<Metrics> metrics_;  // the exposer has a weak one
  const std::unique_ptr<prometheus::Exposer> exposer_;
};

}  // namespace presync
