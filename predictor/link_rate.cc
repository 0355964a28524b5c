#include "predictor/link_rate.h"

#include <algorithm>

#include "absl/numeric/int128.h"

namespace presync {
namespace {

constexpr uint64_t kMinSampleBytes = 64 * 1024;

uint64_t BytesPerSecond(uint64_t bytes, absl::Duration elapsed) {
  const absl::uint128 rate = absl::uint128(bytes) * 1'000'000'000 /
                             static_cast<uint64_t>(absl::ToInt64Nanoseconds(elapsed));
  return rate > UINT64_MAX ? UINT64_MAX : static_cast<uint64_t>(rate);
}

}  // namespace

void LinkRateEstimator::OnSample(uint64_t bytes, absl::Duration elapsed, bool saturated) {
  if (bytes < kMinSampleBytes || elapsed < absl::Nanoseconds(1)) return;
  const uint64_t sample = BytesPerSecond(bytes, elapsed);
  if (!saturated) {
    rate_ = std::max(rate_, sample);
  } else if (!saturated_seen_) {
    saturated_seen_ = true;  // until now there were only bounds: nothing worth averaging with
    rate_ = sample;
  } else if (sample >= rate_) {
    rate_ += (sample - rate_) / 4;
  } else {
    rate_ -= (rate_ - sample) / 4;
  }
}

}  // namespace presync
