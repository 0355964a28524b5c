#include "predictor/set_point.h"

#include <random>

#include "gtest/gtest.h"

namespace presync {
namespace {

// 1 Gb/s of goodput: 24,414 pages in 800 ms, 30,517 in a second.
constexpr LaunchCost kGigabit = {absl::Milliseconds(20), 125'000'000};

TEST(SetPointTest, WhatAPromiseAllows) {
  // (100 - 20) ms at 125 MB/s is 10 MB, and 2441.4 pages.
  EXPECT_EQ(SetPointPages(absl::Milliseconds(100), kGigabit), 2441u);
  EXPECT_EQ(PredictLaunchTime(0, kGigabit), absl::Milliseconds(20));
  // 1000 pages of 4096 bytes at 125 MB/s: 32.768 ms.
  EXPECT_EQ(PredictLaunchTime(1000, kGigabit), absl::Microseconds(52768));
}

TEST(SetPointTest, APromiseAtOrBelowTheFixedCostAllowsNothing) {
  EXPECT_EQ(SetPointPages(absl::Milliseconds(20), kGigabit), 0u);
  EXPECT_EQ(SetPointPages(absl::Milliseconds(19), kGigabit), 0u);
  EXPECT_EQ(SetPointPages(-absl::InfiniteDuration(), kGigabit), 0u);
  EXPECT_EQ(SetPointPages(absl::InfiniteDuration(), {absl::InfiniteDuration(), 1}), 0u);
}

TEST(SetPointTest, AnUnknownRatePromisesNothing) {
  const LaunchCost unknown = {absl::Milliseconds(20), 0};
  EXPECT_EQ(SetPointPages(absl::Seconds(1000), unknown), 0u);
  EXPECT_EQ(PredictLaunchTime(0, unknown), absl::InfiniteDuration());
}

TEST(SetPointTest, ExtremesSaturate) {
  EXPECT_EQ(SetPointPages(absl::InfiniteDuration(), kGigabit), UINT32_MAX);
  EXPECT_EQ(SetPointPages(absl::Hours(1), {absl::ZeroDuration(), UINT64_MAX}), UINT32_MAX);
  // 16 TiB at a byte a second: half a million years.
  EXPECT_EQ(PredictLaunchTime(UINT32_MAX, {absl::ZeroDuration(), 1}),
            absl::Seconds(int64_t{UINT32_MAX} * 4096));
  EXPECT_EQ(PredictLaunchTime(1, {absl::ZeroDuration(), UINT64_MAX}), absl::Nanoseconds(1))
      << "rounded up, or one page would be free";
}

TEST(SetPointTest, IsTheInverseOfThePrediction) {
  constexpr uint32_t kSeed = 7;
  std::mt19937_64 random(kSeed);
  for (int i = 0; i < 2000; ++i) {
    SCOPED_TRACE(testing::Message() << "seed " << kSeed << ", step " << i);
    const LaunchCost cost = {absl::Microseconds(random() % 50'000), 1 + random() % 50'000'000'000};
    const absl::Duration promise = absl::Nanoseconds(random() % 1'000'000'000);
    const PageCount pages = SetPointPages(promise, cost);
    if (promise > cost.fixed) {
      EXPECT_LE(PredictLaunchTime(pages, cost), promise);
    }
    EXPECT_GT(PredictLaunchTime(pages + 1, cost), promise);
  }
}

TEST(SetPointTest, SendsWhatIsAboveAsFarAsTheBudgetGoes) {
  EXPECT_EQ(PagesToSend(100, 100, UINT64_MAX), 0u);
  EXPECT_EQ(PagesToSend(99, 100, UINT64_MAX), 0u);
  EXPECT_EQ(PagesToSend(150, 100, UINT64_MAX), 50u);
  EXPECT_EQ(PagesToSend(150, 100, 10 * 4096 + 4095), 10u);
  EXPECT_EQ(PagesToSend(150, 100, 4095), 0u);
  EXPECT_EQ(PagesToSend(UINT32_MAX, 0, UINT64_MAX), UINT32_MAX);
}

}  // namespace
}  // namespace presync
