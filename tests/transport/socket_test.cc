#include "transport/tcp/socket.h"

#include <fcntl.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/socket.h>

#include <string>
#include <vector>

#include "transport/clock.h"

namespace presync {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;

absl::Time Soon() { return MonotonicNow() + absl::Seconds(30); }

class SocketTest : public ::testing::TestWithParam<const char*> {};

TEST_P(SocketTest, ConnectsAndAccepts) {
  auto listener = Listen(GetParam(), 0);
  if (!listener.ok() && std::string(GetParam()) == "::1") {
    GTEST_SKIP() << "this machine has no IPv6: " << listener.status();
  }
  ASSERT_TRUE(listener.ok()) << listener.status();
  const uint16_t port = *BoundPort(listener->get());
  auto client = Connect(GetParam(), port, Soon());
  ASSERT_TRUE(client.ok()) << client.status();
  auto server = Accept(listener->get(), Soon());
  ASSERT_TRUE(server.ok()) << server.status();
  for (const int fd : {client->get(), server->get()}) {
    EXPECT_EQ(fcntl(fd, F_GETFL) & O_NONBLOCK, 0);
    EXPECT_NE(fcntl(fd, F_GETFD) & FD_CLOEXEC, 0);
  }
  ASSERT_EQ(send(client->get(), "x", 1, 0), 1);
  char byte = 0;
  ASSERT_EQ(recv(server->get(), &byte, 1, 0), 1);
  EXPECT_EQ(byte, 'x');
}

INSTANTIATE_TEST_SUITE_P(Families, SocketTest, ::testing::Values("127.0.0.1", "::1", "localhost"));

TEST(SocketErrors, ARefusalSaysWhoAndWhatToDo) {
  auto listener = Listen("127.0.0.1", 0);
  ASSERT_TRUE(listener.ok());
  const uint16_t port = *BoundPort(listener->get());
  listener->reset();
  const auto status = Connect("127.0.0.1", port, Soon()).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kUnavailable);
  EXPECT_EQ(std::string(status.message()), "connect to " + FormatHostPort("127.0.0.1", port) +
                                               ": connection refused; is presyncd running there?");
}

TEST(SocketErrors, APortInUseIsNamed) {
  auto listener = Listen("127.0.0.1", 0);
  ASSERT_TRUE(listener.ok());
  const auto status = Listen("127.0.0.1", *BoundPort(listener->get())).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kAlreadyExists);
  EXPECT_THAT(std::string(status.message()), AllOf(HasSubstr("127.0.0.1:"), HasSubstr("in use")));
}

TEST(SocketErrors, AcceptEndsAtItsDeadline) {
  auto listener = Listen("127.0.0.1", 0);
  ASSERT_TRUE(listener.ok());
  const absl::Time deadline = MonotonicNow() + absl::Milliseconds(20);
  EXPECT_EQ(Accept(listener->get(), deadline).status().code(), absl::StatusCode::kDeadlineExceeded);
  EXPECT_GE(MonotonicNow(), deadline);
}

TEST(SocketErrors, ConnectEndsAtItsDeadlineWhenNobodyAnswers) {
  // A listener whose queue is full answers nothing.
  auto probe = Listen("127.0.0.1", 0);
  ASSERT_TRUE(probe.ok());
  ASSERT_EQ(listen(probe->get(), 0), 0);  // shrinks its queue
  const uint16_t port = *BoundPort(probe->get());
  std::vector<UniqueFd> fill;
  absl::Status status;
  for (int i = 0; i < 20 && status.ok(); ++i) {
    auto fd = Connect("127.0.0.1", port, MonotonicNow() + absl::Milliseconds(200));
    status = fd.status();
    if (fd.ok()) fill.push_back(*std::move(fd));
  }
  EXPECT_EQ(status.code(), absl::StatusCode::kDeadlineExceeded) << status;
  EXPECT_THAT(std::string(status.message()), HasSubstr("no answer in time"));
}

TEST(SocketErrors, AnUnknownNameIsNotFound) {
  EXPECT_EQ(Listen("256.1.1.1.invalid", 0).status().code(), absl::StatusCode::kNotFound);
}

TEST(HostPortTest, BracketsIPv6) {
  EXPECT_EQ(FormatHostPort("10.0.0.2", 7350), "10.0.0.2:7350");
  EXPECT_EQ(FormatHostPort("fd00::2", 7350), "[fd00::2]:7350");
}

}  // namespace
}  // namespace presync
