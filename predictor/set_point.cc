#include "predictor/set_point.h"

#include <algorithm>

#include "absl/numeric/int128.h"

namespace presync {
namespace {

constexpr uint64_t kNanosPerSecond = 1'000'000'000;

}  // namespace

absl::Duration PredictLaunchTime(PageCount residual, const LaunchCost& cost) {
  if (cost.link_bytes_per_s == 0) return absl::InfiniteDuration();
  const uint64_t bytes = PagesToBytes(residual);
  const uint64_t seconds = bytes / cost.link_bytes_per_s;
  const absl::uint128 rest = bytes % cost.link_bytes_per_s;
  // Rounded up, so that SetPointPages is its exact inverse.
  const absl::uint128 nanos =
      (rest * kNanosPerSecond + cost.link_bytes_per_s - 1) / cost.link_bytes_per_s;
  return cost.fixed + absl::Seconds(static_cast<int64_t>(seconds)) +
         absl::Nanoseconds(static_cast<int64_t>(absl::Uint128Low64(nanos)));
}

PageCount SetPointPages(absl::Duration promise, const LaunchCost& cost) {
  if (cost.link_bytes_per_s == 0 || promise <= cost.fixed) return 0;
  // Saturates at 292 years; at 1 byte/s that is still 2 million pages, and no link is that slow.
  const absl::uint128 spare_nanos =
      static_cast<uint64_t>(absl::ToInt64Nanoseconds(promise - cost.fixed));
  const absl::uint128 pages = spare_nanos * cost.link_bytes_per_s / kNanosPerSecond / kPageBytes;
  return static_cast<PageCount>(std::min<absl::uint128>(pages, UINT32_MAX));
}

PageCount PagesToSend(PageCount stale, PageCount set_point, uint64_t budget_bytes) {
  if (stale <= set_point) return 0;
  return static_cast<PageCount>(std::min<uint64_t>(stale - set_point, budget_bytes / kPageBytes));
}

}  // namespace presync
