// How fast the background sync may use its link: tells the pacer what the link saw, and has the
// link spread out what the pacer allows.
#pragma once

#include <cstdint>

#include "absl/time/time.h"
#include "predictor/pacer.h"
#include "transport/link.h"

namespace presync {

// One thread at a time. Never blocks.
class LinkPace {
 public:
  // As the operator caps it (0 = no cap), adapting at most once an `interval`.
  LinkPace(uint64_t max_bytes_per_s, absl::Duration interval, absl::Time now);

  // The link that counts from now on; it must live until the next Begin or End. It starts unpaced.
  void Begin(SourceLink* link);
  void End() { link_ = nullptr; }

  // As the pacer has them.
  uint64_t AvailableBytes(absl::Time now) { return pacer_.AvailableBytes(now); }
  void Spend(uint64_t bytes) { pacer_.Spend(bytes); }
  uint64_t rate_bytes_per_s() const { return pacer_.rate_bytes_per_s(); }
  int pressed_intervals() const { return pacer_.pressed_intervals(); }

  // The pacer has held something back.
  void NoteStarved() { starved_ = true; }

  // Looks at the link's queue in the network; every few milliseconds.
  void Sample();

  // Ends an interval. `link_bytes_per_s`: the link's estimated rate, 0 = unknown.
  void OnInterval(absl::Time now, uint64_t link_bytes_per_s);

  // The link goes as fast as it can, for a launch or to measure it, until Resume.
  void Lift();
  void Resume() { lifted_ = false; }
  // Whether the link is held below what it could do, so that it tells nothing of its own rate.
  bool paced() const { return paced_; }

  // The link was under pressure since its rate was measured last, and is not any more: somebody
  // shared it then.
  bool rate_is_suspect() const { return suspect_ && calm_intervals_ >= kCalmIntervals; }
  void OnMeasured() { suspect_ &= calm_intervals_ == 0; }

 private:
  void Pace(uint64_t link_bytes_per_s);

  static constexpr int kCalmIntervals = 5;

  Pacer pacer_;
  const absl::Duration interval_;
  SourceLink* link_ = nullptr;
  uint64_t marks_ = 0;  // the link's congestion marks at the last interval
  // Since the last interval:
  absl::Duration least_queueing_delay_ = absl::InfiniteDuration();
  bool starved_ = false;
  bool paced_ = false;
  bool lifted_ = false;
  bool suspect_ = false;
  int calm_intervals_ = 0;
};

}  // namespace presync
