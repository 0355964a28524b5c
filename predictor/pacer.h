// The pacer: how fast the background sync may go. Slow start, and less than best effort: it takes
// spare capacity and yields. Ideas of TCP slow start, LEDBAT (RFC 6817), TIMELY (SIGCOMM 2015) and
// Swift (SIGCOMM 2020). docs/prediction.md, "Pacing", has the rules with their numbers.
#pragma once

#include <cstdint>
#include <limits>

#include "absl/time/time.h"

namespace presync {

// What the last interval looked like. Signals that can't be measured stay at their defaults.
struct PacerSignals {
  uint64_t link_bytes_per_s = 0;  // best estimate of the link's goodput; 0 = unknown
  absl::Duration completion_latency = absl::ZeroDuration();  // median; 0 = none measured
  absl::Duration queueing_delay = absl::ZeroDuration();      // in the network; 0 = none, or unknown
  absl::Duration round_trip = absl::ZeroDuration();          // of the path without any queue
  double queue_fill = 0;                                     // of the link's send queue, 0 to 1
  bool congestion_marks = false;                             // ECN or CNP counters grew
  bool guest_pressure = false;                               // the guest is visibly slowed
  bool demand = false;  // the sync had more to send than it was allowed
};

// A token bucket whose rate follows the signals. Pure: time comes in as values, and a time before
// the last one counts as the last one. Not thread-safe.
class Pacer {
 public:
  struct Options {
    uint64_t max_bytes_per_s = 0;  // the operator's cap; 0 = none
    // Where the rate starts, and its step when it grows slowly, unless 1 % of the link is more.
    // Should be small against the slowest link.
    uint64_t initial_bytes_per_s = 1 << 20;
    absl::Duration interval = absl::Milliseconds(100);
    // What the bucket holds, as time at the rate: longer bursts would fill the network's queues by
    // themselves. Twice the time between two looks at the bucket, or bytes are lost to a late one.
    absl::Duration burst = absl::Milliseconds(20);
  };

  // Preconditions (CHECKed): interval, burst and initial_bytes_per_s are above 0.
  Pacer(const Options& options, absl::Time now);

  // Bytes that may be sent now. Never negative, and at most Options::burst's worth, or one page
  // where that is more: otherwise a very low cap would never let a page go.
  uint64_t AvailableBytes(absl::Time now);

  // Takes `bytes` from the bucket; may go into debt by one write, which later tokens pay off.
  void Spend(uint64_t bytes);

  // Adapts the rate, at most once an interval (a call that comes earlier changes nothing but what
  // it learns of latency and demand). With demand it doubles up to ssthresh, then grows by 1 % of
  // the link, and by twice as much after every 5 intervals without pressure: who filled the link
  // has left it. On pressure ssthresh becomes half the rate, and the rate shrinks with the delay
  // above target, or by half for signals that don't say how bad it is. After 2 s without demand it
  // restarts at min(rate, ssthresh / 2). It goes up to twice the link's estimated rate: below
  // saturation an estimate is only a lower bound, which must be able to grow.
  void OnInterval(absl::Time now, const PacerSignals& signals);

  uint64_t rate_bytes_per_s() const { return rate_; }
  bool in_slow_start() const { return rate_ < ssthresh_; }

  // Intervals with pressure in a row, up to now. From 2 on the owner should also scan and arm half
  // as often: then the sending alone was not the cause.
  int pressed_intervals() const { return pressed_intervals_; }

 private:
  uint64_t Cap(const PacerSignals& signals) const;
  // The start, and the step of slow growth.
  uint64_t Floor(const PacerSignals& signals) const;
  // What pressure leaves.
  uint64_t Least(const PacerSignals& signals) const;
  void Refill(absl::Time now);
  void ObserveLatency(absl::Time now, absl::Duration latency);
  // Latency above its target as a share of the whole, in thousandths; 0 at or below target.
  uint64_t ExcessDelayPermille(absl::Duration latency) const;
  // The rate's factor after this interval in thousandths: 1000 = no pressure, never below 500.
  uint64_t BackOffPermille(const PacerSignals& signals) const;
  void Grow(uint64_t step);

  Options options_;
  uint64_t rate_;
  uint64_t ssthresh_ = std::numeric_limits<uint64_t>::max();
  int64_t tokens_ = 0;
  uint64_t token_billionths_ = 0;  // what refills left over below one byte
  absl::Time last_refill_;
  absl::Time last_interval_;
  absl::Time last_demand_;
  // Two windows of 10 s: the one before keeps the minimum known while the new one is still
  // measuring.
  absl::Duration min_latency_ = absl::InfiniteDuration();
  absl::Duration previous_min_latency_ = absl::InfiniteDuration();
  absl::Time min_latency_since_;
  int pressed_intervals_ = 0;
  int calm_intervals_ = 0;  // without pressure, with demand
};

}  // namespace presync
