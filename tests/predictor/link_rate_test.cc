#include "predictor/link_rate.h"

#include "gtest/gtest.h"

namespace presync {
namespace {

constexpr uint64_t kMiB = 1 << 20;

TEST(LinkRateTest, UnknownAtFirstAndShortSamplesSayNothing) {
  LinkRateEstimator rate;
  EXPECT_EQ(rate.bytes_per_s(), 0u);
  rate.OnSample(64 * 1024 - 1, absl::Milliseconds(1), true);
  rate.OnSample(kMiB, absl::ZeroDuration(), true);
  rate.OnSample(kMiB, -absl::Seconds(1), true);
  EXPECT_EQ(rate.bytes_per_s(), 0u);
  rate.OnSample(64 * 1024, absl::Seconds(1), false);
  EXPECT_EQ(rate.bytes_per_s(), 64u * 1024);
}

TEST(LinkRateTest, TheFirstSaturatedSampleReplacesBounds) {
  LinkRateEstimator rate;
  rate.OnSample(10 * kMiB, absl::Seconds(1), false);
  rate.OnSample(2 * kMiB, absl::Seconds(1), true);
  EXPECT_EQ(rate.bytes_per_s(), 2 * kMiB);
}

TEST(LinkRateTest, SaturatedSamplesMoveAQuarterBoundsRaiseAtOnceAndNeverLower) {
  LinkRateEstimator rate;
  rate.OnSample(8 * kMiB, absl::Seconds(1), true);
  rate.OnSample(12 * kMiB, absl::Seconds(1), true);
  EXPECT_EQ(rate.bytes_per_s(), 9 * kMiB);
  rate.OnSample(5 * kMiB, absl::Seconds(1), true);
  EXPECT_EQ(rate.bytes_per_s(), 8 * kMiB);
  rate.OnSample(kMiB, absl::Seconds(1), false);
  EXPECT_EQ(rate.bytes_per_s(), 8 * kMiB);
  rate.OnSample(20 * kMiB, absl::Seconds(1), false);
  EXPECT_EQ(rate.bytes_per_s(), 20 * kMiB);
}

TEST(LinkRateTest, ExtremesDoNotOverflow) {
  LinkRateEstimator rate;
  rate.OnSample(UINT64_MAX, absl::Nanoseconds(1), true);
  EXPECT_EQ(rate.bytes_per_s(), UINT64_MAX);
  rate.OnSample(kMiB, absl::InfiniteDuration(), true);
  EXPECT_EQ(rate.bytes_per_s(), UINT64_MAX - UINT64_MAX / 4);
}

}  // namespace
}  // namespace presync
