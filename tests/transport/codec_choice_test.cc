// A simulated stream, so that the choice depends on no machine's speed.
#include "transport/tcp/codec_choice.h"

#include <gtest/gtest.h>

#include <algorithm>

namespace presync {
namespace {

constexpr double kMB = 1e6;

// What pages, CPU and wire are like. Speeds in bytes per second.
struct World {
  double wire = 125 * kMB;
  double send_cpu = 5000 * kMB;
  double lz4 = 500 * kMB, lz4_ratio = 0.5;
  double zstd = 250 * kMB, zstd_ratio = 0.4;
};

// Carries chunks of 256 KiB as a FrameSender does. The socket's buffer holds 512 KiB, which the
// wire drains while the CPU works.
class Simulation {
 public:
  void Run(const World& world, uint64_t guest_bytes, bool backlogged = true) {
    for (uint64_t end = sent_ + guest_bytes; sent_ < end;) SendChunk(world, backlogged);
  }
  // Guest bytes a second over the next `guest_bytes`.
  double Rate(const World& world, uint64_t guest_bytes) {
    const double start = time_;
    Run(world, guest_bytes);
    return static_cast<double>(guest_bytes) / (time_ - start);
  }
  Codec codec() const { return chooser_.codec(); }

 private:
  static constexpr double kChunk = 262144;

  double Compress(const World& world, Codec codec, double bytes) {
    const double speed = codec == Codec::kLz4 ? world.lz4 : world.zstd;
    const double ratio = codec == Codec::kLz4 ? world.lz4_ratio : world.zstd_ratio;
    const double wire = bytes * std::min(ratio, 1.0);
    Pass(world, bytes / speed);
    chooser_.OnCompressed(codec, static_cast<uint64_t>(bytes), static_cast<uint64_t>(wire),
                          absl::Seconds(bytes / speed));
    return wire;
  }

  void Pass(const World& world, double seconds) {
    time_ += seconds;
    buffered_ = std::max(0.0, buffered_ - seconds * world.wire);
  }

  void SendChunk(const World& world, bool backlogged) {
    const double start = time_;
    if (chooser_.WantsSample()) {
      Compress(world, Codec::kLz4, 65536);
      Compress(world, Codec::kZstd, 65536);
      chooser_.OnSampled();
    }
    const Codec codec = chooser_.codec();
    const double wire = codec == Codec::kNone ? kChunk : Compress(world, codec, kChunk);
    const double built = time_;
    Pass(world, wire / world.send_cpu);
    buffered_ += wire;
    Pass(world, std::max(0.0, buffered_ - 524288) / world.wire);
    sent_ += static_cast<uint64_t>(kChunk);
    chooser_.OnSent({static_cast<uint64_t>(kChunk), static_cast<uint64_t>(wire),
                     absl::Seconds(built - start), absl::Seconds(time_ - built),
                     absl::Seconds(wire / world.send_cpu), backlogged});
  }

  CodecChooser chooser_;
  double time_ = 0;
  double buffered_ = 0;
  uint64_t sent_ = 0;
};

constexpr uint64_t kLong = uint64_t{1} << 30;

TEST(CodecChoiceTest, StartsPlain) { EXPECT_EQ(CodecChooser().codec(), Codec::kNone); }

TEST(CodecChoiceTest, ASlowWireGetsTheSmallest) {
  Simulation simulation;
  simulation.Run({.wire = 50 * kMB}, kLong);
  EXPECT_EQ(simulation.codec(), Codec::kZstd);
}

TEST(CodecChoiceTest, AWireBetweenTheCodecsGetsTheQuickOne) {
  Simulation simulation;
  simulation.Run({.wire = 200 * kMB}, kLong);
  EXPECT_EQ(simulation.codec(), Codec::kLz4);
}

TEST(CodecChoiceTest, AFastWireIsLeftAlone) {
  const World world = {.wire = 3000 * kMB};
  Simulation simulation;
  simulation.Run(world, kLong);
  EXPECT_EQ(simulation.codec(), Codec::kNone);
  EXPECT_GT(simulation.Rate(world, kLong), 0.95 * 3000 * kMB);
}

TEST(CodecChoiceTest, WhatDoesNotCompressIsSentPlain) {
  const World world = {.wire = 50 * kMB, .lz4_ratio = 1, .zstd_ratio = 1};
  Simulation simulation;
  simulation.Run(world, kLong);
  EXPECT_EQ(simulation.codec(), Codec::kNone);
  EXPECT_GT(simulation.Rate(world, kLong), 0.97 * 50 * kMB);
}

TEST(CodecChoiceTest, ComesCloseToTheBestOfTheThreeWhateverTheWire) {
  for (double wire = 10 * kMB; wire < 10000 * kMB; wire *= 1.7) {
    for (const double ratio : {0.05, 0.3, 0.7, 0.9, 1.0}) {
      const World world = {.wire = wire, .lz4_ratio = ratio, .zstd_ratio = 0.8 * ratio};
      Simulation simulation;
      simulation.Run(world, kLong);
      const double plain = std::min(wire, world.send_cpu);
      const double lz4 = 1 / std::max(1 / world.lz4 + ratio / world.send_cpu, ratio / wire);
      const double zstd =
          1 / std::max(1 / world.zstd + 0.8 * ratio / world.send_cpu, 0.8 * ratio / wire);
      const double rate = simulation.Rate(world, kLong);
      EXPECT_GT(rate, 0.85 * std::max({plain, lz4, zstd})) << "wire " << wire << " ratio " << ratio;
      EXPECT_GT(rate, 0.95 * plain) << "wire " << wire << " ratio " << ratio;
    }
  }
}

TEST(CodecChoiceTest, FollowsAWireThatBecomesFastAndSlowAgain) {
  Simulation simulation;
  simulation.Run({.wire = 50 * kMB}, kLong);
  EXPECT_NE(simulation.codec(), Codec::kNone);
  simulation.Run({.wire = 4000 * kMB}, 4 * kLong);
  EXPECT_EQ(simulation.codec(), Codec::kNone);
  simulation.Run({.wire = 50 * kMB}, kLong);
  EXPECT_NE(simulation.codec(), Codec::kNone);
}

TEST(CodecChoiceTest, FollowsPagesThatNoLongerCompress) {
  Simulation simulation;
  simulation.Run({.wire = 50 * kMB}, kLong);
  simulation.Run({.wire = 50 * kMB, .lz4_ratio = 1, .zstd_ratio = 1}, kLong);
  EXPECT_EQ(simulation.codec(), Codec::kNone);
}

TEST(CodecChoiceTest, LearnsNothingOfTheWireWhileNothingWaits) {
  Simulation simulation;
  simulation.Run({.wire = 10 * kMB}, kLong, /*backlogged=*/false);
  EXPECT_EQ(simulation.codec(), Codec::kNone);
}

}  // namespace
}  // namespace presync
