#include "predictor/pacer.h"

#include <algorithm>

#include "absl/numeric/int128.h"
#include "predictor/check.h"
#include "predictor/page.h"

namespace presync {
namespace {

constexpr uint64_t kNanosPerSecond = 1'000'000'000;

// Above any link there is; keeps doubling without a cap from overflowing.
constexpr uint64_t kMaxRate = uint64_t{1} << 42;
constexpr uint64_t kLinkShare = 100;  // start and slow growth: 1 % of the link
// Pressure never takes it below 5 % of the link: whoever shares it keeps 95 %, and a host so busy
// that each round trip looks like a queue can't starve the sync.
constexpr uint64_t kLeastShare = 20;
constexpr int kCalmPerDoubling = 5;  // of the step of slow growth, in intervals
constexpr int kMostDoublings = 6;

// These follow the papers named in the header; the two durations are this project's design, to be
// revised by measurement on real links.
constexpr double kFullQueue = 0.5;
constexpr absl::Duration kLatencySlack = absl::Microseconds(25);
// A queue that is longer than this, or than half the round trip on longer paths, is shared with
// somebody, or made by us. LEDBAT (RFC 6817) allows 100 ms, for home routers; but a single Linux
// TCP flow keeps no more than some 1 ms in the queue of its own host (tcp_limit_output_bytes), and
// it is to be seen.
constexpr absl::Duration kLeastQueueingTarget = absl::Microseconds(500);
constexpr uint64_t kSmallestBackOffPermille = 500;
constexpr uint64_t kDelayGainPermille = 800;  // Swift's beta
constexpr absl::Duration kLatencyWindow = absl::Seconds(10);
constexpr absl::Duration kIdle = absl::Seconds(2);

uint64_t BytesIn(uint64_t bytes_per_s, absl::Duration time) {
  const uint64_t nanos = static_cast<uint64_t>(absl::ToInt64Nanoseconds(time));
  const absl::uint128 bytes = absl::uint128(bytes_per_s) * nanos / kNanosPerSecond;
  return static_cast<uint64_t>(std::min<absl::uint128>(bytes, kMaxRate));
}

// How much of `delay` is above `target`, in thousandths of the delay.
uint64_t ExcessPermille(absl::Duration delay, absl::Duration target) {
  if (delay <= target) return 0;
  const absl::int128 excess = absl::ToInt64Nanoseconds(delay - target);
  return static_cast<uint64_t>(excess * 1000 / absl::ToInt64Nanoseconds(delay));
}

}  // namespace

Pacer::Pacer(const Options& options, absl::Time now)
    : options_(options),
      rate_(0),
      last_refill_(now),
      last_interval_(now),
      last_demand_(now),
      min_latency_since_(now) {
  PRESYNC_CHECK(options.interval >= absl::Nanoseconds(1));
  PRESYNC_CHECK(options.burst >= absl::Nanoseconds(1));
  PRESYNC_CHECK(options.initial_bytes_per_s > 0);
  rate_ = Floor(PacerSignals());
}

uint64_t Pacer::Cap(const PacerSignals& signals) const {
  uint64_t cap = kMaxRate;
  if (signals.link_bytes_per_s > 0) {
    const uint64_t link = std::min(signals.link_bytes_per_s, kMaxRate / 2);
    cap = std::max(2 * link, options_.initial_bytes_per_s);
  }
  return options_.max_bytes_per_s > 0 ? std::min(cap, options_.max_bytes_per_s) : cap;
}

uint64_t Pacer::Floor(const PacerSignals& signals) const {
  const uint64_t share = signals.link_bytes_per_s / kLinkShare;
  return std::min(std::max(share, options_.initial_bytes_per_s), Cap(signals));
}

uint64_t Pacer::Least(const PacerSignals& signals) const {
  return std::max(signals.link_bytes_per_s / kLeastShare, Floor(signals));
}

uint64_t Pacer::AvailableBytes(absl::Time now) {
  Refill(now);
  return tokens_ > 0 ? static_cast<uint64_t>(tokens_) : 0;
}

void Pacer::Spend(uint64_t bytes) { tokens_ -= static_cast<int64_t>(std::min(bytes, kMaxRate)); }

void Pacer::Refill(absl::Time now) {
  if (now <= last_refill_) return;
  const absl::uint128 nanos = static_cast<uint64_t>(absl::ToInt64Nanoseconds(now - last_refill_));
  const absl::uint128 billionths = nanos * rate_ + token_billionths_;
  const absl::uint128 bytes = billionths / kNanosPerSecond;
  token_billionths_ = static_cast<uint64_t>(billionths % kNanosPerSecond);
  last_refill_ = now;

  const int64_t depth = static_cast<int64_t>(std::max(BytesIn(rate_, options_.burst), kPageBytes));
  // Compared as a difference: a long silence may be worth more bytes than 64 bits hold.
  if (tokens_ >= depth || bytes >= absl::uint128(static_cast<uint64_t>(depth - tokens_))) {
    tokens_ = depth;
    token_billionths_ = 0;
  } else {
    tokens_ += static_cast<int64_t>(bytes);
  }
}

void Pacer::ObserveLatency(absl::Time now, absl::Duration latency) {
  if (now - min_latency_since_ >= kLatencyWindow) {
    previous_min_latency_ = min_latency_;
    min_latency_ = absl::InfiniteDuration();
    min_latency_since_ = now;
  }
  if (latency > absl::ZeroDuration()) min_latency_ = std::min(min_latency_, latency);
}

uint64_t Pacer::ExcessDelayPermille(absl::Duration latency) const {
  const absl::Duration minimum = std::min(min_latency_, previous_min_latency_);
  if (latency <= absl::ZeroDuration() || minimum == absl::InfiniteDuration()) return 0;
  const absl::Duration target = minimum + std::max(kLatencySlack, minimum / 2);
  return ExcessPermille(latency, target);
}

uint64_t Pacer::BackOffPermille(const PacerSignals& signals) const {
  if (signals.congestion_marks || signals.guest_pressure || signals.queue_fill > kFullQueue) {
    return kSmallestBackOffPermille;
  }
  const absl::Duration target = std::max(kLeastQueueingTarget, signals.round_trip / 2);
  const uint64_t excess = std::max(ExcessDelayPermille(signals.completion_latency),
                                   ExcessPermille(signals.queueing_delay, target));
  const uint64_t cut = kDelayGainPermille * excess / 1000;
  return std::max(1000 - cut, kSmallestBackOffPermille);
}

void Pacer::Grow(uint64_t step) {
  rate_ = in_slow_start() ? std::min(2 * rate_, ssthresh_) : rate_ + step;
}

void Pacer::OnInterval(absl::Time now, const PacerSignals& signals) {
  Refill(now);  // what was earned until now was earned at the old rate
  ObserveLatency(now, signals.completion_latency);
  const bool was_idle = now - last_demand_ >= kIdle;
  if (now - last_interval_ < options_.interval) {
    if (signals.demand && !was_idle) last_demand_ = now;
    return;
  }
  last_interval_ = now;
  if (signals.demand) last_demand_ = now;

  const uint64_t floor = Floor(signals);
  const uint64_t back_off = BackOffPermille(signals);
  if (was_idle) rate_ = std::min(rate_, ssthresh_ / 2);
  if (back_off < 1000) {
    ++pressed_intervals_;
    calm_intervals_ = 0;
    ssthresh_ = std::max(rate_ / 2, floor);
    rate_ = std::max(rate_ * back_off / 1000, std::min(rate_, Least(signals)));
  } else {
    pressed_intervals_ = 0;
    if (signals.demand && !was_idle) {
      Grow(floor << std::min(calm_intervals_++ / kCalmPerDoubling, kMostDoublings));
    }
  }
  rate_ = std::clamp(rate_, floor, Cap(signals));
}

}  // namespace presync
