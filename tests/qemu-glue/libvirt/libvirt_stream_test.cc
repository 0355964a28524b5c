// The device state on its way into a QEMU that libvirt runs as soon as it has all of it.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <poll.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <string>
#include <thread>

#include "absl/time/clock.h"
#include "qemu-glue/libvirt/libvirt_target_guest.h"
#include "qemu-glue/libvirt/libvirt_target_host.h"
#include "qemu-glue/libvirt/saved_stream.h"
#include "qemu-glue/libvirt/unix_socket.h"
#include "transport/clock.h"

namespace presync {
namespace {

struct Pair {
  Pair() {
    int ends[2];
    EXPECT_EQ(::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends), 0);
    one = UniqueFd(ends[0]);
    other = UniqueFd(ends[1]);
  }
  UniqueFd one, other;
};

ReturnBytes Ignore() {
  return [](absl::string_view) {};
}

absl::Time Soon() { return MonotonicNow() + absl::Seconds(20); }

std::string Read(int fd, size_t size) {
  std::string got(size, '\0');
  size_t have = 0;
  while (have < size) {
    const ssize_t n = ::read(fd, got.data() + have, size - have);
    if (n <= 0) break;
    have += static_cast<size_t>(n);
  }
  got.resize(have);
  return got;
}

bool HasMore(int fd, int wait_ms = 20) {
  pollfd p = {.fd = fd, .events = POLLIN, .revents = 0};
  return ::poll(&p, 1, wait_ms) > 0;
}

TEST(HeldBackStream, KeepsTheLastByteUntilItIsReleased) {
  Pair source, qemu;
  HeldBackStream stream(std::move(source.other), std::move(qemu.one), Ignore());
  const std::string state(300'000, 'x');
  std::string got;
  std::thread reader([&] { got = Read(qemu.other.get(), state.size()); });
  for (const std::string& piece : {state.substr(0, 1), state.substr(1), std::string("!")}) {
    ASSERT_EQ(::write(source.one.get(), piece.data(), piece.size()),
              static_cast<ssize_t>(piece.size()));
  }
  source.one.reset();
  ASSERT_TRUE(stream.AwaitPassed(Soon()).ok());
  reader.join();
  EXPECT_EQ(got, state);
  EXPECT_FALSE(HasMore(qemu.other.get()));
  ASSERT_TRUE(stream.Release().ok());
  EXPECT_EQ(Read(qemu.other.get(), 1), "!");
}

TEST(HeldBackStream, IsNotPassedBeforeTheOtherEndHasReadIt) {
  Pair source, qemu;
  HeldBackStream stream(std::move(source.other), std::move(qemu.one), Ignore());
  ASSERT_EQ(::write(source.one.get(), "abc", 3), 3);
  source.one.reset();
  EXPECT_TRUE(
      absl::IsDeadlineExceeded(stream.AwaitPassed(MonotonicNow() + absl::Milliseconds(50))));
  EXPECT_EQ(Read(qemu.other.get(), 2), "ab");
  EXPECT_TRUE(stream.AwaitPassed(Soon()).ok());
}

TEST(HeldBackStream, SaysWhenTheOtherEndIsGone) {
  Pair source, qemu;
  HeldBackStream stream(std::move(source.other), std::move(qemu.one), Ignore());
  ASSERT_EQ(::write(source.one.get(), "abc", 3), 3);
  source.one.reset();
  qemu.other.reset();
  EXPECT_TRUE(absl::IsUnavailable(stream.AwaitPassed(Soon())));
}

TEST(HeldBackStream, AnEmptyStreamIsNoState) {
  Pair source, qemu;
  HeldBackStream stream(std::move(source.other), std::move(qemu.one), Ignore());
  source.one.reset();
  EXPECT_TRUE(absl::IsFailedPrecondition(stream.AwaitPassed(Soon())));
}

// Also where QEMU does not read: its buffer is full.
TEST(HeldBackStream, EndsWithoutTheLastByteWhenItIsDestroyed) {
  Pair source, qemu;
  {
    HeldBackStream stream(std::move(source.other), std::move(qemu.one), Ignore());
    std::thread writer([&] {
      const std::string state(4 << 20, 'x');
      (void)!::send(source.one.get(), state.data(), state.size(), MSG_NOSIGNAL);
    });
    EXPECT_TRUE(HasMore(qemu.other.get(), 20'000));
    absl::SleepFor(absl::Milliseconds(20));
    ::shutdown(source.one.get(), SHUT_RDWR);
    writer.join();
  }
  EXPECT_LT(Read(qemu.other.get(), 8 << 20).size(), size_t{4} << 20);
}

TEST(HeldBackStream, PassesBackWhatTheOtherEndAnswers) {
  Pair source, qemu;
  Mutex mutex;
  std::string answer;
  HeldBackStream stream(std::move(source.other), std::move(qemu.one), [&](absl::string_view bytes) {
    MutexLock lock(&mutex);
    answer.append(bytes.data(), bytes.size());
  });
  ASSERT_EQ(::write(qemu.other.get(), "loaded", 6), 6);
  MutexLock lock(&mutex);
  EXPECT_TRUE(mutex.AwaitWithDeadline([&] { return answer == "loaded"; }, Soon()));
}

// As QEMU ends its streams: EOF, mark, length, JSON.
std::string Described(const std::string& json) {
  std::string text("state\0\6", 7);
  for (int shift = 24; shift >= 0; shift -= 8) {
    text += static_cast<char>(json.size() >> shift & 0xff);
  }
  return text + json;
}

TEST(StreamEnd, IsFoundHoweverTheStreamIsCut) {
  const std::string json = "{\"page_size\": 4096, \"devices\": [{\"name\": \"x\"}]}";
  const std::string stream = std::string(5000, '}') + Described(json);
  for (const size_t piece : {size_t{1}, size_t{7}, size_t{4096}, stream.size()}) {
    StreamEnd end;
    for (size_t at = 0; at < stream.size(); at += piece) {
      const bool last = at + piece >= stream.size();
      EXPECT_EQ(end.Take(std::string_view(stream).substr(at, piece)), last) << at;
    }
  }
}

TEST(StreamEnd, IsNotWhatOnlyLooksLikeIt) {
  StreamEnd end;
  EXPECT_FALSE(end.Take(""));
  EXPECT_FALSE(end.Take(Described("{\"a\": 1}") + "}"));
  EXPECT_FALSE(end.Take(std::string("\0\6\0\0\0\2[}", 8)));
}

TEST(SavedStream, EndsWhereTheStreamEndsThoughQemuKeepsItsSocket) {
  Pair qemu, relay;
  SavedStream saved(std::move(qemu.other), std::move(relay.one));
  const std::string stream = std::string(100'000, 'x') + Described("{\"a\": {}}");
  std::string got;
  std::thread reader([&] { got = Read(relay.other.get(), 1 << 20); });
  ASSERT_EQ(::write(qemu.one.get(), stream.data(), stream.size()),
            static_cast<ssize_t>(stream.size()));
  EXPECT_TRUE(saved.AwaitWhole(Soon()).ok());
  reader.join();
  EXPECT_EQ(got, stream);
}

TEST(SavedStream, SaysWhenTheStreamBreaksOff) {
  Pair qemu, relay;
  SavedStream saved(std::move(qemu.other), std::move(relay.one));
  ASSERT_EQ(::write(qemu.one.get(), "abc", 3), 3);
  EXPECT_TRUE(absl::IsDeadlineExceeded(saved.AwaitWhole(MonotonicNow() + absl::Milliseconds(20))));
  qemu.one.reset();
  EXPECT_TRUE(absl::IsUnavailable(saved.AwaitWhole(Soon())));
  EXPECT_EQ(Read(relay.other.get(), 10), "abc");
}

TEST(SavedStream, CanBeTakenAsWhole) {
  Pair qemu, relay;
  SavedStream saved(std::move(qemu.other), std::move(relay.one));
  ASSERT_EQ(::write(qemu.one.get(), "abc", 3), 3);
  saved.TakeAsWhole();
  EXPECT_TRUE(saved.AwaitWhole(Soon()).ok());
  EXPECT_EQ(Read(relay.other.get(), 10), "abc");
}

TEST(ReadMemoryBackingDir, ReadsWhatLibvirtReads) {
  char folder[] = "/tmp/presync-libvirt-test-XXXXXX";
  ASSERT_NE(::mkdtemp(folder), nullptr);
  const std::string conf = std::string(folder) + "/qemu.conf";
  EXPECT_EQ(ReadMemoryBackingDir(conf), "/var/lib/libvirt/qemu/ram");
  std::ofstream(conf) << "# memory_backing_dir = \"/no\"\n"
                         "user = \"x\"\nmemory_backing_dir=\"/dev/shm/vm\"\n";
  EXPECT_EQ(ReadMemoryBackingDir(conf), "/dev/shm/vm");
  std::filesystem::remove_all(folder);
}

}  // namespace
}  // namespace presync
