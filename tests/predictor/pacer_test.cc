#include "predictor/pacer.h"

#include <algorithm>

#include "gtest/gtest.h"

namespace presync {
namespace {

constexpr uint64_t kLink = 1'000'000'000;  // bytes/s; 1 % is 10 MB/s
constexpr absl::Duration kInterval = absl::Milliseconds(100);

// Drives one pacer through time; every interval has demand unless a test says otherwise.
class PacerTest : public ::testing::Test {
 protected:
  static Pacer::Options Defaults() {
    Pacer::Options options;
    options.initial_bytes_per_s = 1'000'000;
    return options;
  }
  static PacerSignals Busy(uint64_t link = kLink) {
    PacerSignals signals;
    signals.link_bytes_per_s = link;
    signals.demand = true;
    return signals;
  }
  static PacerSignals Latency(absl::Duration latency) {
    PacerSignals signals = Busy();
    signals.completion_latency = latency;
    return signals;
  }
  static PacerSignals Marked() {
    PacerSignals signals = Busy();
    signals.congestion_marks = true;
    return signals;
  }
  uint64_t Step(const PacerSignals& signals) {
    now_ += kInterval;
    pacer_.OnInterval(now_, signals);
    return pacer_.rate_bytes_per_s();
  }
  void StepTo(uint64_t rate) {
    for (int i = 0; pacer_.rate_bytes_per_s() < rate; ++i) {
      ASSERT_LT(i, 1000) << "stuck at " << pacer_.rate_bytes_per_s();
      Step(Busy());
    }
  }

  absl::Time now_ = absl::FromUnixSeconds(1'700'000'000);
  Pacer pacer_{Defaults(), now_};
};

TEST_F(PacerTest, StartsAtOnePercentOfTheLinkAndDoubles) {
  EXPECT_EQ(pacer_.rate_bytes_per_s(), 1'000'000u);
  EXPECT_EQ(Step(Busy()), 10'000'000u) << "2 MB/s, but 1 % of the link is more";
  EXPECT_EQ(Step(Busy()), 20'000'000u);
  EXPECT_EQ(Step(Busy()), 40'000'000u);
  EXPECT_TRUE(pacer_.in_slow_start());
}

TEST_F(PacerTest, DoublesWhileTheLinkIsUnknown) {
  uint64_t expected = 1'000'000;
  for (int i = 0; i < 12; ++i) EXPECT_EQ(Step(Busy(0)), expected *= 2);
  for (int i = 0; i < 200; ++i) Step(Busy(0));
  EXPECT_EQ(pacer_.rate_bytes_per_s(), uint64_t{1} << 42) << "nothing overflows";
}

TEST_F(PacerTest, ALowerBoundOfTheLinkDoesNotHoldItBack) {
  // What a session does: what was confirmed at this rate is the next estimate, until the link is
  // full.
  uint64_t link = 0;
  for (int i = 0; i < 30; ++i) {
    const uint64_t rate = Step(Busy(link));
    link = std::max(link, std::min(rate, kLink));
  }
  EXPECT_EQ(link, kLink);
  EXPECT_EQ(pacer_.rate_bytes_per_s(), 2 * kLink);
}

TEST_F(PacerTest, DoesNotGrowWithoutDemand) {
  PacerSignals quiet = Busy();
  quiet.demand = false;
  EXPECT_EQ(Step(quiet), 10'000'000u) << "the start moves to 1 % of the link once that is known";
  EXPECT_EQ(Step(quiet), 10'000'000u);
}

TEST_F(PacerTest, AMarkHalvesAndGrowthGoesOnByOnePercent) {
  StepTo(160'000'000);
  EXPECT_EQ(Step(Marked()), 80'000'000u);
  EXPECT_FALSE(pacer_.in_slow_start());
  EXPECT_EQ(Step(Busy()), 90'000'000u);
  EXPECT_EQ(Step(Busy()), 100'000'000u);
}

TEST_F(PacerTest, SlowGrowthQuickensAsLongAsNothingPresses) {
  StepTo(160'000'000);
  Step(Marked());
  const auto grow = [&] {
    const uint64_t before = pacer_.rate_bytes_per_s();
    return Step(Busy()) - before;
  };
  for (const uint64_t step : {10'000'000, 20'000'000, 40'000'000, 80'000'000}) {
    for (int i = 0; i < 5; ++i) EXPECT_EQ(grow(), step);
  }
  Step(Marked());
  EXPECT_EQ(grow(), 10'000'000u) << "careful again";
}

TEST_F(PacerTest, EachSignalIsPressure) {
  PacerSignals full_queue = Busy(), slow_guest = Busy(), half_queue = Busy();
  full_queue.queue_fill = 0.51;
  half_queue.queue_fill = 0.5;
  slow_guest.guest_pressure = true;
  StepTo(160'000'000);
  EXPECT_EQ(Step(full_queue), 80'000'000u);
  EXPECT_EQ(pacer_.pressed_intervals(), 1);
  EXPECT_EQ(Step(slow_guest), 50'000'000u) << "not half: 5 % of the link";
  EXPECT_EQ(pacer_.pressed_intervals(), 2);
  EXPECT_EQ(Step(half_queue), 60'000'000u);
  EXPECT_EQ(pacer_.pressed_intervals(), 0);
}

TEST_F(PacerTest, AQueueInTheNetworkIsPressureAsFarAsItIsAboveItsTarget) {
  PacerSignals at_target = Busy(), above = Busy(), far_above = Busy();
  at_target.queueing_delay = absl::Microseconds(500);
  above.queueing_delay = absl::Microseconds(600);
  far_above.queueing_delay = absl::Milliseconds(5);
  StepTo(160'000'000);
  EXPECT_EQ(Step(above), 138'880'000u);
  EXPECT_EQ(pacer_.pressed_intervals(), 1);
  const uint64_t before = pacer_.rate_bytes_per_s();
  EXPECT_EQ(Step(far_above), before / 2);
  EXPECT_EQ(Step(at_target), before / 2 + 10'000'000) << "no pressure";
  at_target.round_trip = absl::Milliseconds(30);
  at_target.queueing_delay = absl::Milliseconds(15);
  EXPECT_EQ(Step(at_target), before / 2 + 20'000'000) << "long paths wobble by more";
  // A flow that keeps the queue full for minutes is never taken for the path's own latency.
  for (int i = 0; i < 1000; ++i) Step(far_above);
  EXPECT_EQ(pacer_.rate_bytes_per_s(), 50'000'000u) << "the least: 5 % of the link";
}

TEST_F(PacerTest, NeverFallsBelowTheFloor) {
  StepTo(20'000'000);
  for (int i = 0; i < 10; ++i) EXPECT_EQ(Step(Marked()), 20'000'000u) << "it had less than that";
  StepTo(160'000'000);
  for (int i = 0; i < 10; ++i) Step(Marked());
  EXPECT_EQ(pacer_.rate_bytes_per_s(), 50'000'000u);
  EXPECT_EQ(Step(Busy()), 60'000'000u) << "and recovers";
}

TEST_F(PacerTest, LatencyShrinksTheRateWithTheDelayAboveTarget) {
  Step(Latency(absl::Microseconds(100)));  // target: 100 + max(25, 50) = 150 us
  StepTo(160'000'000);
  EXPECT_EQ(Step(Latency(absl::Microseconds(150))), 320'000'000u) << "on target";
  // (200 - 150) / 200 = 0.25 above, times 0.8: a fifth less.
  EXPECT_EQ(Step(Latency(absl::Microseconds(200))), 256'000'000u);
  // ssthresh was set to half of 320 MB/s, so growth is slow now: 10 MB/s.
  EXPECT_EQ(Step(Latency(absl::Microseconds(120))), 266'000'000u);
  // (1500 - 150) / 1500 = 0.9, times 0.8: more than half, which is the limit.
  EXPECT_EQ(Step(Latency(absl::Microseconds(1500))), 133'000'000u);
}

TEST_F(PacerTest, ShortLatenciesHaveASlackOf25Microseconds) {
  Step(Latency(absl::Microseconds(5)));  // target 30 us, not 7.5
  StepTo(160'000'000);
  EXPECT_EQ(Step(Latency(absl::Microseconds(30))), 320'000'000u);
  EXPECT_LT(Step(Latency(absl::Microseconds(40))), 320'000'000u);
}

TEST_F(PacerTest, ALongerPathIsAcceptedOnceTheMinimumWasMeasuredAnew) {
  Step(Latency(absl::Microseconds(100)));
  int pressed = 0;
  for (int i = 0; i < 300; ++i) {
    Step(Latency(absl::Milliseconds(1)));
    if (pacer_.pressed_intervals() > 0) pressed = i + 1;
  }
  EXPECT_GE(pressed, 100) << "the minimum must outlive its window of 10 s";
  EXPECT_LE(pressed, 200) << "and be forgotten after the next";
}

TEST_F(PacerTest, AdaptsAtMostOnceAnInterval) {
  StepTo(160'000'000);
  for (int i = 0; i < 9; ++i) pacer_.OnInterval(now_ += kInterval / 10, Marked());
  EXPECT_EQ(pacer_.rate_bytes_per_s(), 160'000'000u);
  pacer_.OnInterval(now_ += kInterval / 10, Marked());
  EXPECT_EQ(pacer_.rate_bytes_per_s(), 80'000'000u);
}

TEST_F(PacerTest, RestartsAfterIdleAtHalfTheThreshold) {
  StepTo(320'000'000);
  Step(Marked());  // ssthresh and rate 160 MB/s
  StepTo(200'000'000);
  PacerSignals quiet = Busy();
  quiet.demand = false;
  for (int i = 0; i < 19; ++i) EXPECT_EQ(Step(quiet), 200'000'000u);
  for (int i = 0; i < 30; ++i) EXPECT_EQ(Step(quiet), 80'000'000u) << "once, however long it lasts";
  EXPECT_TRUE(pacer_.in_slow_start());
  EXPECT_EQ(Step(Busy()), 80'000'000u) << "the first interval after idle still restarts";
  EXPECT_EQ(Step(Busy()), 160'000'000u);
  EXPECT_EQ(Step(Busy()), 180'000'000u) << "by steps: the sixth interval without pressure";
}

TEST_F(PacerTest, PressureRightAfterIdleDoesNotSaveTheOldRate) {
  StepTo(320'000'000);
  Step(Marked());  // ssthresh and rate 160 MB/s
  now_ += absl::Seconds(5);
  EXPECT_EQ(Step(Marked()), 50'000'000u) << "restarted at 80 MB/s, then halved, but for 5 %";
}

TEST_F(PacerTest, TheOperatorsCapHolds) {
  Pacer::Options options = Defaults();
  options.max_bytes_per_s = 3'000'000;
  Pacer capped(options, now_);
  for (int i = 0; i < 50; ++i) {
    now_ += kInterval;
    capped.OnInterval(now_, Busy(i % 2 == 0 ? kLink : 0));
    EXPECT_LE(capped.rate_bytes_per_s(), 3'000'000u);
    EXPECT_LE(capped.AvailableBytes(now_), 60'000u);
  }
  EXPECT_EQ(capped.rate_bytes_per_s(), 3'000'000u);
}

TEST_F(PacerTest, ACapBelowTheStartIsTheStart) {
  Pacer::Options options = Defaults();
  options.max_bytes_per_s = 10'000;  // 1000 bytes an interval, less than a page
  Pacer capped(options, now_);
  EXPECT_EQ(capped.rate_bytes_per_s(), 10'000u);
  EXPECT_EQ(capped.AvailableBytes(now_ + absl::Milliseconds(409)), 4090u);
  EXPECT_EQ(capped.AvailableBytes(now_ + absl::Seconds(60)), 4096u) << "a page can always go";
}

TEST_F(PacerTest, TheBucketHoldsTwentyMillisecondsAndFillsExactly) {
  EXPECT_EQ(pacer_.AvailableBytes(now_), 0u);
  for (int i = 0; i < 10'000; ++i) pacer_.AvailableBytes(now_ += absl::Nanoseconds(1500));
  EXPECT_EQ(pacer_.AvailableBytes(now_), 15'000u) << "1.5 bytes a call, none lost";
  EXPECT_EQ(pacer_.AvailableBytes(now_ - absl::Seconds(1)), 15'000u) << "time never goes back";
  EXPECT_EQ(pacer_.AvailableBytes(now_ += absl::Hours(100'000)), 20'000u);
}

TEST_F(PacerTest, DebtIsPaidOff) {
  now_ += kInterval;
  ASSERT_EQ(pacer_.AvailableBytes(now_), 20'000u);
  pacer_.Spend(170'000);
  EXPECT_EQ(pacer_.AvailableBytes(now_), 0u);
  EXPECT_EQ(pacer_.AvailableBytes(now_ += absl::Milliseconds(150)), 0u);
  EXPECT_EQ(pacer_.AvailableBytes(now_ += absl::Milliseconds(10)), 10'000u);
}

TEST_F(PacerTest, OverTimeItSendsWhatTheRateSays) {
  uint64_t sent = 0;
  for (int i = 0; i < 10'000; ++i) {
    now_ += absl::Microseconds(137);
    const uint64_t available = pacer_.AvailableBytes(now_);
    if (available < 4096) continue;
    pacer_.Spend(4096);
    sent += 4096;
  }
  EXPECT_NEAR(static_cast<double>(sent), 1.37e6, 4096);
}

TEST_F(PacerTest, SameCallsSameAnswers) {
  Pacer other(Defaults(), now_);
  for (int i = 0; i < 500; ++i) {
    PacerSignals signals = Latency(absl::Microseconds(100 + (i * 37) % 90));
    signals.demand = i % 50 < 25;
    Step(signals);
    other.OnInterval(now_, signals);
    ASSERT_EQ(pacer_.rate_bytes_per_s(), other.rate_bytes_per_s());
    ASSERT_EQ(pacer_.AvailableBytes(now_), other.AvailableBytes(now_));
  }
}

}  // namespace
}  // namespace presync
