#include "transport/wire/control_channel.h"

#include <gtest/gtest.h>
#include <sys/socket.h>
#include <unistd.h>

#include <string>
#include <thread>

#include "transport/clock.h"
#include "transport/wire/preamble.h"

namespace presync {
namespace {

using Body = wire::ControlMessage;

struct Pair {
  Pair() {
    int fds[2];
    EXPECT_EQ(::socketpair(AF_UNIX, SOCK_STREAM, 0, fds), 0);
    a.reset(fds[0]);
    b.reset(fds[1]);
  }
  UniqueFd a, b;
};

absl::Time Soon() { return MonotonicNow() + absl::Seconds(5); }

Body Ping(uint64_t sequence) {
  Body message;
  message.mutable_ping()->set_sequence(sequence);
  return message;
}

TEST(ControlChannel, MessagesArriveWholeAndInOrder) {
  Pair pair;
  ControlChannel a(std::move(pair.a), "a"), b(std::move(pair.b), "b");
  Body big;
  big.mutable_state_chunk()->set_data(std::string(kMaxStateChunkBytes, 'x'));
  std::thread sender([&] {
    EXPECT_TRUE(a.Send(Ping(1), Soon()).ok());
    EXPECT_TRUE(a.Send(big, Soon()).ok());
    EXPECT_TRUE(a.Send(Ping(2), Soon()).ok());
  });
  EXPECT_EQ(b.Receive(Soon())->ping().sequence(), 1u);
  EXPECT_EQ(b.Receive(Soon())->state_chunk().data().size(), kMaxStateChunkBytes);
  EXPECT_EQ(b.Receive(Soon())->ping().sequence(), 2u);
  sender.join();
}

TEST(ControlChannel, ADeadlineKeepsWhatHasArrivedOfAMessage) {
  Pair pair;
  const int raw = pair.a.get();
  ControlChannel b(std::move(pair.b), "b");
  std::string frame;
  ASSERT_TRUE(Ping(7).SerializeToString(&frame));
  frame.insert(0, std::string({static_cast<char>(frame.size()), 0, 0, 0}));
  ASSERT_EQ(::write(raw, frame.data(), 5), 5);
  EXPECT_EQ(b.Receive(MonotonicNow() + absl::Milliseconds(20)).status().code(),
            absl::StatusCode::kDeadlineExceeded);
  ASSERT_EQ(::write(raw, frame.data() + 5, frame.size() - 5),
            static_cast<ssize_t>(frame.size()) - 5);
  EXPECT_EQ(b.Receive(Soon())->ping().sequence(), 7u);
}

// Its length was damaged on the way: what follows it is taken for its rest, a few bytes at a time.
TEST(ControlChannel, AFrameThatDoesNotEndIsNotWaitedForWithoutEnd) {
  Pair pair;
  const int raw = pair.a.get();
  ControlChannel b(std::move(pair.b), "b", absl::Milliseconds(100));
  ASSERT_EQ(::write(raw, "\0\x20\0\0", 4), 4);
  absl::Status last;
  for (int i = 0; i < 100 && (last.ok() || absl::IsDeadlineExceeded(last)); ++i) {
    ASSERT_EQ(::write(raw, "abcd", 4), 4);
    last = b.Receive(MonotonicNow() + absl::Milliseconds(10)).status();
  }
  EXPECT_TRUE(absl::IsInvalidArgument(last)) << last;
}

TEST(ControlChannel, RefusesWhatIsNoFrame) {
  for (const std::string& bytes :
       {std::string("\xff\xff\xff\xff"), std::string("\x04\0\0\0\xff\xff\xff\xff", 8),
        std::string("\0\0\0\0", 4)}) {
    Pair pair;
    ControlChannel b(std::move(pair.b), "b");
    ASSERT_EQ(::write(pair.a.get(), bytes.data(), bytes.size()),
              static_cast<ssize_t>(bytes.size()));
    EXPECT_EQ(b.Receive(Soon()).status().code(), absl::StatusCode::kInvalidArgument);
  }
}

TEST(ControlChannel, AClosedConnectionIsUnavailableBothWays) {
  Pair pair;
  ControlChannel b(std::move(pair.b), "b");
  pair.a.reset();
  EXPECT_EQ(b.Receive(Soon()).status().code(), absl::StatusCode::kUnavailable);
  absl::Status status;
  for (int i = 0; i < 10 && status.ok(); ++i) status = b.Send(Ping(1), Soon());
  EXPECT_EQ(status.code(), absl::StatusCode::kUnavailable);
}

TEST(ControlChannel, APeerThatDoesNotReadEndsTheSendAtItsDeadline) {
  Pair pair;
  ControlChannel b(std::move(pair.b), "b");
  Body big;
  big.mutable_state_chunk()->set_data(std::string(kMaxStateChunkBytes, 'x'));
  absl::Status status;
  for (int i = 0; i < 1000 && status.ok(); ++i) {
    status = b.Send(big, MonotonicNow() + absl::Milliseconds(50));
  }
  EXPECT_EQ(status.code(), absl::StatusCode::kDeadlineExceeded);
  EXPECT_FALSE(b.Send(Ping(1), Soon()).ok()) << "part of a frame is out: this is final";
}

TEST(Preamble, SurvivesTheTripAndRefusesEverythingElse) {
  Preamble data = {.kind = Preamble::Kind::kData, .stream = 3, .token = {1, 2, 3}};
  const auto bytes = EncodePreamble(data);
  const absl::StatusOr<Preamble> back = DecodePreamble(bytes);
  ASSERT_TRUE(back.ok());
  EXPECT_EQ(back->stream, 3u);
  EXPECT_EQ(back->token, data.token);
  for (size_t i = 0; i < 12; ++i) {  // magic and kind
    auto broken = bytes;
    broken[i] ^= 0x80;
    EXPECT_FALSE(DecodePreamble(broken).ok()) << "byte " << i;
  }
  EXPECT_FALSE(DecodePreamble(absl::MakeSpan(bytes).subspan(0, 31)).ok());
}

}  // namespace
}  // namespace presync
