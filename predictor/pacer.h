// The pacer: how fast the background sync may go. Slow start, and less than best effort: it takes spare
// capacity and yields. Ideas of TCP slow start, LEDBAT (RFC 6817) and TIMELY (SIGCOMM 2015).
#pragma once

#include <cstdint>

#include "absl/time/time.h"

namespace presync {

// What the last interval looked like. Signals that can't be measured stay at their defaults.
struct PacerSignals {
  uint64_t link_bytes_per_s = 0;        // best estimate of the link's goodput; 0 = unknown
  absl::Duration completion_latency = absl::ZeroDuration();  // median; 0 = none measured
  double queue_fill = 0;                // of the link's send queue, 0 to 1
  bool congestion_marks = false;        // ECN or CNP counters grew
  bool guest_pressure = false;          // the guest is visibly slowed
  bool demand = false;                  // the sync had more to send than it was allowed
};

// A token bucket whose rate follows the signals. Pure: time comes in as values. Not thread-safe.
class Pacer {
 public:
  struct Options {
    uint64_t max_bytes_per_s = 0;          // the operator's cap; 0 = none
    uint64_t initial_bytes_per_s = 1 << 20;  // until the link's rate is known; then 1 % of it, if more
    absl::Duration interval = absl::Milliseconds(100);
  };

  Pacer(const Options& options, absl::Time now);

  // Bytes that may be sent now. Never negative; a burst is at most one interval's worth.
  uint64_t AvailableBytes(absl::Time now);

  // Takes `bytes` from the bucket; may go into debt by one write, which later tokens pay off.
  void Spend(uint64_t bytes);

  // Adapts the rate, at most once an interval: doubles up to ssthresh, then grows by 1 % of the link;
  // on pressure ssthresh becomes half the rate and the rate shrinks with the delay above target. After
  // 2 s without demand it restarts at min(rate, ssthresh / 2).
  void OnInterval(absl::Time now, const PacerSignals& signals);

  uint64_t rate_bytes_per_s() const { return rate_; }
  bool in_slow_start() const { return rate_ < ssthresh_; }

 private:
  uint64_t Cap(const PacerSignals& signals) const;

  Options options_;
  uint64_t rate_;
  uint64_t ssthresh_;
  int64_t tokens_ = 0;
  absl::Time last_refill_;
  absl::Time last_interval_;
  absl::Time last_demand_;
  absl::Duration min_latency_ = absl::InfiniteDuration();
  absl::Time min_latency_since_;
};

}  // namespace presync
