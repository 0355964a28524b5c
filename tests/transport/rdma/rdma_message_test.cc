#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <random>

#include "transport/rdma/message.h"

namespace presync {
namespace {

RdmaMessage ZeroMessage() {
  RdmaMessage message = {.type = MessageType::kZero, .runs = 2, .number = 7};
  message.run[0] = {5, 9};
  message.run[1] = {0xfffffff0, 3};
  return message;
}

TEST(RdmaMessage, ComesBackAsItWasSent) {
  std::array<std::byte, kMaxMessageBytes> bytes;
  const size_t size = EncodeMessage(ZeroMessage(), bytes.data());
  EXPECT_EQ(size, kMessageHeaderBytes + 16);
  const auto message = DecodeMessage(absl::MakeConstSpan(bytes).first(size));
  ASSERT_TRUE(message.ok()) << message.status();
  EXPECT_EQ(message->runs, 2u);
  EXPECT_EQ(message->number, 7u);
  EXPECT_EQ(message->run[0], (PageRun{5, 9}));
  EXPECT_EQ(message->run[1], (PageRun{0xfffffff0, 3}));
}

TEST(RdmaMessage, RefusesEveryFieldThatIsOutOfPlace) {
  std::array<std::byte, kMaxMessageBytes> good;
  const size_t size = EncodeMessage(ZeroMessage(), good.data());
  struct Change {
    size_t offset;
    int value;
  };
  // Type, number of runs, message number, and a commit id where none belongs.
  for (const Change change : {Change{0, 0},
                              {0, 2},
                              {0, 3},
                              {0, 4},
                              {1, 1},
                              {4, 0},
                              {4, 1},
                              {4, 3},
                              {5, 1},
                              {7, 255},
                              {8, 0},
                              {16, 1}}) {
    auto bytes = good;
    bytes[change.offset] = static_cast<std::byte>(change.value);
    EXPECT_FALSE(DecodeMessage(absl::MakeConstSpan(bytes).first(size)).ok())
        << change.offset << " = " << change.value;
  }
  for (const size_t bad : {size_t{0}, size_t{23}, size - 1, size + 1, size + 8}) {
    EXPECT_FALSE(DecodeMessage(absl::MakeConstSpan(good).first(bad)).ok()) << bad;
  }
}

TEST(RdmaMessage, RandomBytesHarmNobody) {
  std::mt19937_64 random(11);
  for (int i = 0; i < 20000; ++i) {
    std::vector<std::byte> bytes(random() % (kMaxMessageBytes + 20));
    for (std::byte& b : bytes) b = static_cast<std::byte>(random() % 5);
    const auto message = DecodeMessage(bytes);
    EXPECT_TRUE(!message.ok() || message->runs <= kMaxMessageRuns);
  }
}

TEST(RdmaConnectData, ComesBackAndNothingElseIsTaken) {
  ConnectData data = {.index = 3, .total = 4};
  data.token.fill(0xab);
  const auto bytes = EncodeConnectData(data);
  const auto back = DecodeConnectData(bytes);
  ASSERT_TRUE(back.ok());
  EXPECT_EQ(back->index, 3u);
  EXPECT_EQ(back->total, 4u);
  EXPECT_EQ(back->token, data.token);
  auto other = bytes;
  other[0] = 'X';
  EXPECT_FALSE(DecodeConnectData(other).ok());
  EXPECT_FALSE(DecodeConnectData(absl::MakeConstSpan(bytes).first(27)).ok());
  EXPECT_FALSE(DecodeConnectData({}).ok());
}

}  // namespace
}  // namespace presync
