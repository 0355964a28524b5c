// The clock of every deadline and every interval: monotonic, so that a host's clock that is set
// back or forward moves none of them. Such a time counts from no date: it is compared with others
// of this process only, and becomes a date (`ToWallTime`) where a person or a file gets to see it.
//
// absl::Now() is for these few places alone; tests/clocks looks for it everywhere else.
#pragma once

#include <algorithm>
#include <chrono>

#include "absl/time/clock.h"
#include "absl/time/time.h"

namespace presync {

// CLOCK_MONOTONIC, which stands still while the host is suspended: so does what is waited for.
inline absl::Time MonotonicNow() {
  return absl::UnixEpoch() + absl::FromChrono(std::chrono::steady_clock::now().time_since_epoch());
}

// The same for the standard library's waits. The infinite future stays a time that never comes.
inline std::chrono::steady_clock::time_point ToSteadyTime(absl::Time monotonic) {
  return std::chrono::steady_clock::time_point(
      absl::ToChronoNanoseconds(std::max(monotonic - absl::UnixEpoch(), absl::ZeroDuration())));
}

// The date of a monotonic time, by the host's clock as it is set now. Infinite times stay infinite.
inline absl::Time ToWallTime(absl::Time monotonic) {
  return absl::Now() + (monotonic - MonotonicNow());
}

// The monotonic time of something that just happened and was given a date by another program of
// this host, which is never later than now. A clock that was set since makes it wrong by the step:
// the caller bounds it by what else it knows.
inline absl::Time FromWallTime(absl::Time date) {
  return MonotonicNow() - std::max(absl::Now() - date, absl::ZeroDuration());
}

}  // namespace presync
