// The link's goodput, estimated from what was confirmed while the link was kept busy.
#pragma once

#include <cstdint>

#include "absl/time/time.h"

namespace presync {

// Pure, not thread-safe. Samples shorter than 64 KiB are ignored: they measure latency, not rate.
class LinkRateEstimator {
 public:
  // `bytes` of guest memory were confirmed in `elapsed`. `saturated`: the link had more to send all
  // the time, so the sample is the link's rate; otherwise it is only a lower bound.
  void OnSample(uint64_t bytes, absl::Duration elapsed, bool saturated);

  // 0 while nothing is known. Saturated samples move it by a quarter of the difference; a lower
  // bound raises it at once.
  uint64_t bytes_per_s() const { return rate_; }

 private:
  uint64_t rate_ = 0;
  bool saturated_seen_ = false;
};

}  // namespace presync
