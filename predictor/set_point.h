// The set-point: how many stale pages a promise allows, and what a launch would take now.
#pragma once

#include <cstdint>

#include "absl/time/time.h"
#include "predictor/page.h"

namespace presync {

// What the link and a handover cost here, as far as it was measured.
struct LaunchCost {
  absl::Duration fixed =
      absl::ZeroDuration();       // all of a launch that does not depend on the residual
  uint64_t link_bytes_per_s = 0;  // goodput of guest bytes; 0 = not measured yet
};

// Predicted time from launch to running with `residual` stale pages: fixed + residual / rate.
// InfiniteDuration while the link rate is not known.
absl::Duration PredictLaunchTime(PageCount residual, const LaunchCost& cost);

// The largest residual whose predicted launch time is within `promise`; 0 if the fixed cost alone
// is above it or the rate is not known.
PageCount SetPointPages(absl::Duration promise, const LaunchCost& cost);

// Pages to send now: what is above the set-point, at most what `budget_bytes` pays for.
PageCount PagesToSend(PageCount stale, PageCount set_point, uint64_t budget_bytes);

}  // namespace presync
