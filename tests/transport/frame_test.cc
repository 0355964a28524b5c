#include "transport/tcp/frame.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <array>
#include <random>

namespace presync {
namespace {

using Header = std::array<std::byte, kFrameHeaderBytes>;

Header Encode(const Frame& frame) {
  Header header;
  EncodeFrame(frame, header.data());
  return header;
}

TEST(FrameTest, EachTypeComesBack) {
  for (const Frame& frame :
       {Frame{FrameType::kBytes, {7, 3}, 3 * 4096, 0}, Frame{FrameType::kZero, {512, 512}, 0, 0},
        Frame{FrameType::kLz4, {UINT32_MAX - 1, 1}, 4095, 0},
        Frame{FrameType::kZstd, {0, 512}, 1, 0}, Frame{FrameType::kCommit, {}, 0, 1},
        Frame{FrameType::kAck, {}, 0, UINT64_MAX}}) {
    auto decoded = DecodeFrame(Encode(frame));
    ASSERT_TRUE(decoded.ok()) << decoded.status();
    EXPECT_EQ(*decoded, frame);
  }
}

TEST(FrameTest, LooksAsItIsWrittenDown) {
  const Header header = Encode({FrameType::kBytes, {0x01020304, 2}, 8192, 0});
  const Header expected = {
      std::byte{1}, {},           {}, {}, std::byte{4}, std::byte{3}, std::byte{2},
      std::byte{1}, std::byte{2}, {}, {}, {},           {},           std::byte{0x20}};
  EXPECT_EQ(header, expected);
}

TEST(FrameTest, WhateverDecodesEncodesToTheSameBytes) {
  const uint32_t seed = std::random_device()();
  SCOPED_TRACE(::testing::Message() << "seed " << seed);
  std::mt19937 random(seed);
  int accepted = 0;
  for (int round = 0; round < 200000; ++round) {
    // Bytes near a good header: random ones would never pass the first check.
    auto below = [&](uint32_t limit) { return static_cast<uint32_t>(random() % limit); };
    Header header = Encode({static_cast<FrameType>(1 + below(6)),
                            {below(2000), below(600)},
                            below(3) * 4096,
                            below(2)});
    if (random() % 2 == 0) header[random() % header.size()] ^= std::byte(1 << random() % 8);
    auto decoded = DecodeFrame(header);
    if (!decoded.ok()) {
      ASSERT_EQ(decoded.status().code(), absl::StatusCode::kInvalidArgument);
      continue;
    }
    ++accepted;
    ASSERT_EQ(Encode(*decoded), header);
    ASSERT_LE(decoded->payload_bytes, PagesToBytes(kShardPages));
  }
  EXPECT_GT(accepted, 0);
}

TEST(FrameTest, RefusesAHeaderOfAnotherLength) {
  EXPECT_EQ(DecodeFrame({}).status().code(), absl::StatusCode::kInvalidArgument);
}

TEST(FrameTest, RunsAreCutAtShardsAndAtTheLimit) {
  PageRun run{500, 600};
  std::vector<PageRun> pieces;
  while (run.count > 0) pieces.push_back(TakeFrameRun(&run, 300));
  EXPECT_THAT(pieces, ::testing::ElementsAre(PageRun{500, 12}, PageRun{512, 300}, PageRun{812, 212},
                                             PageRun{1024, 76}));
}

}  // namespace
}  // namespace presync
