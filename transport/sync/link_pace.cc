#include "transport/sync/link_pace.h"

#include <algorithm>

namespace presync {
namespace {

// The link sends what it was given at this multiple of the rate, so that it is done in time for
// more, but not below this part of its own rate: a launch that lifts the pace finds the first
// bytes on their way already.
constexpr uint64_t kHeadroomPart = 4;  // a quarter more
constexpr uint64_t kLeastPart = 4;

}  // namespace

LinkPace::LinkPace(uint64_t max_bytes_per_s, absl::Duration interval, absl::Time now)
    : pacer_({.max_bytes_per_s = max_bytes_per_s, .interval = interval}, now),
      interval_(interval) {}

void LinkPace::Begin(SourceLink* link) {
  link_ = link;
  marks_ = link->stats().congestion_marks;
  least_queueing_delay_ = absl::InfiniteDuration();
  paced_ = lifted_ = false;
}

// The least of an interval: a busy host makes single round trips longer, a flow that fills a queue
// all of them.
void LinkPace::Sample() {
  if (link_ == nullptr) return;
  least_queueing_delay_ = std::min(least_queueing_delay_, link_->stats().queueing_delay);
}

void LinkPace::OnInterval(absl::Time now, uint64_t link_bytes_per_s) {
  PacerSignals signals = {.link_bytes_per_s = link_bytes_per_s, .demand = starved_};
  starved_ = false;
  if (link_ == nullptr) {
    pacer_.OnInterval(now, signals);
    return;
  }
  const LinkStats stats = link_->stats();
  // The network's latency, and not that of all completions: over TCP those say when the kernel took
  // the bytes, and on a busy host that jitters by far more than any network delay; the rate fell to
  // its floor by it (2026-11-22). A queue worth a whole interval of the link is full: what waits
  // there came too early.
  signals.completion_latency = stats.network_latency;
  signals.queueing_delay = std::min(least_queueing_delay_, stats.queueing_delay);
  least_queueing_delay_ = absl::InfiniteDuration();
  signals.round_trip = stats.round_trip;
  signals.congestion_marks = stats.congestion_marks > marks_;
  marks_ = stats.congestion_marks;
  const double interval_bytes = std::max<double>(
      1 << 20, static_cast<double>(link_bytes_per_s) * absl::ToDoubleSeconds(interval_));
  // What waits behind a pace of its own is no sign.
  if (!paced_) signals.queue_fill = std::min(1.0, stats.queued_bytes / interval_bytes);
  pacer_.OnInterval(now, signals);
  const bool pressed = pacer_.pressed_intervals() > 0;
  suspect_ |= pressed;
  calm_intervals_ = pressed ? 0 : calm_intervals_ + 1;
  if (!lifted_) Pace(link_bytes_per_s);
}

void LinkPace::Pace(uint64_t link_bytes_per_s) {
  const uint64_t rate = pacer_.rate_bytes_per_s();
  const uint64_t pace = std::max(rate + rate / kHeadroomPart, link_bytes_per_s / kLeastPart);
  paced_ = link_bytes_per_s > 0 && pace < link_bytes_per_s;
  link_->SetPacing(paced_ ? pace : 0);
}

void LinkPace::Lift() {
  lifted_ = true;
  if (link_ == nullptr || !paced_) return;
  link_->SetPacing(0);
  paced_ = false;
}

}  // namespace presync
