#include "qemu-glue/socket_peer.h"

#include <gtest/gtest.h>
#include <poll.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <string>

#include "transport/unix_address.h"

namespace presync {
namespace {

class SocketPeerTest : public ::testing::Test {
 protected:
  SocketPeerTest() {
    char name[] = "/tmp/presync-peer-XXXXXX";
    folder_ = ::mkdtemp(name);
    address_ = *UnixAddress(folder_ + "/s");
    listener_.reset(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0));
    EXPECT_EQ(::bind(listener_.get(), Raw(address_), sizeof(address_)), 0);
  }
  ~SocketPeerTest() override {
    ::unlink((folder_ + "/s").c_str());
    ::rmdir(folder_.c_str());
  }

  // A child calls listen(), and then lives for as long as `until` is open.
  pid_t ListenInChild(int until) {
    int ready[2];
    EXPECT_EQ(::pipe(ready), 0);
    const pid_t child = ::fork();
    if (child == 0) {
      char byte = 0;
      const bool listens = ::listen(listener_.get(), 4) == 0;
      if (listens && ::write(ready[1], &byte, 1) == 1) (void)!::read(until, &byte, 1);
      ::_exit(0);
    }
    char byte;
    EXPECT_EQ(::read(ready[0], &byte, 1), 1);
    ::close(ready[0]);
    ::close(ready[1]);
    return child;
  }

  absl::StatusOr<SocketPeer> Connect() {
    socket_.reset(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0));
    EXPECT_EQ(::connect(socket_.get(), Raw(address_), sizeof(address_)), 0);
    return PeerOf(socket_.get());
  }

  std::string folder_;
  sockaddr_un address_;
  UniqueFd listener_, socket_;
};

TEST_F(SocketPeerTest, IsTheProcessThatListens) {
  ASSERT_EQ(::listen(listener_.get(), 4), 0);
  const absl::StatusOr<SocketPeer> peer = Connect();
  ASSERT_TRUE(peer.ok()) << peer.status();
  EXPECT_EQ(peer->pid, ::getpid());
  pollfd ended = {peer->pidfd.get(), POLLIN, 0};
  EXPECT_EQ(::poll(&ended, 1, 0), 0);
}

// A socket outlives the process that opened it; the number may be another's by then.
TEST_F(SocketPeerTest, OneThatHasEndedIsNobody) {
  int until[2];
  ASSERT_EQ(::pipe(until), 0);
  const pid_t child = ListenInChild(until[0]);
  absl::StatusOr<SocketPeer> peer = Connect();
  ASSERT_TRUE(peer.ok()) << peer.status();
  EXPECT_EQ(peer->pid, child);
  ASSERT_EQ(::write(until[1], "", 1), 1);
  ASSERT_EQ(::waitpid(child, nullptr, 0), child);
  pollfd ended = {peer->pidfd.get(), POLLIN, 0};
  EXPECT_EQ(::poll(&ended, 1, 0), 1) << "what was taken hold of is still the same process";
  peer = Connect();  // the socket still takes connections
  // Newer kernels hand out a process that has ended; older ones say that there is none.
  if (peer.ok()) {
    ended.fd = peer->pidfd.get();
    EXPECT_EQ(::poll(&ended, 1, 0), 1);
  } else {
    EXPECT_EQ(peer.status().code(), absl::StatusCode::kUnavailable) << peer.status();
  }
  ::close(until[0]);
  ::close(until[1]);
}

}  // namespace
}  // namespace presync
