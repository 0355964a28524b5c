// The library in QEMU and its protocol: what it refuses, what it survives, what it keeps.
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include <cstring>
#include <random>
#include <thread>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "qemu-glue/dirty_log/glue_client.h"
#include "qemu-glue/dirty_log/guest_process.h"
#include "qemu-glue/dirty_log/probe.h"
#include "qemu-glue/dirty_log/uffd_handler_log.h"
#include "qemu-glue/plugin/kernel_abi.h"
#include "tests/qemu-glue/dirty_log/guest_fixture.h"
#include "transport/clock.h"

namespace presync {
namespace {

using testing::GuestRegionSpec;
using ::testing::HasSubstr;
using testing::SyntheticGuest;
using testing::TempFolder;

absl::Time Soon() { return MonotonicNow() + absl::Seconds(20); }

constexpr PageCount kPages = 64;

class GlueTest : public ::testing::Test {
 protected:
  GlueClient Connect() {
    absl::StatusOr<GlueClient> client =
        GlueClient::Connect(guest_.socket(), guest_.process(), Soon());
    EXPECT_TRUE(client.ok()) << client.status();
    return *std::move(client);
  }

  uint64_t RamAddress(GlueClient* client) {
    const auto process = GuestProcess::Open(client, Soon());
    EXPECT_TRUE(process.ok()) << process.status();
    return (*FindSegments(process->maps(), guest_.regions()))[0].address;
  }

  SyntheticGuest guest_{std::vector<GuestRegionSpec>{{kPages}}};
};

// A socket that sends whatever it is told to.
UniqueFd RawConnect(const std::string& path) {
  UniqueFd fd(::socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0));
  sockaddr_un address = {};
  address.sun_family = AF_UNIX;
  path.copy(address.sun_path, path.size());
  EXPECT_EQ(::connect(fd.get(), reinterpret_cast<sockaddr*>(&address), sizeof(address)), 0);
  const timeval patience = {20, 0};
  ::setsockopt(fd.get(), SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof(patience));
  char hello[256];
  EXPECT_EQ(::recv(fd.get(), hello, sizeof(hello), 0),
            static_cast<ssize_t>(sizeof(presync_glue_reply)));
  return fd;
}

bool IsHungUpOn(const UniqueFd& fd) {
  char byte;
  const ssize_t bytes = ::recv(fd.get(), &byte, 1, 0);
  return bytes == 0 || (bytes < 0 && errno == ECONNRESET);
}

TEST_F(GlueTest, SocketIsForItsOwnerOnly) {
  struct stat file = {};
  ASSERT_EQ(::stat(guest_.socket().c_str(), &file), 0);
  EXPECT_EQ(file.st_mode & 0777, 0600u);
}

TEST_F(GlueTest, SaysWhoItIs) {
  GlueClient client = Connect();
  EXPECT_EQ(client.pid(), guest_.pid());
  EXPECT_EQ(client.pid_within(), guest_.pid());
  EXPECT_EQ(client.ranges(), 0u);
  EXPECT_TRUE(client.Ping(Soon()).ok());
}

TEST_F(GlueTest, GarbageEndsTheConnectionAndNothingElse) {
  const auto seed = std::random_device()();
  SCOPED_TRACE(::testing::Message() << "seed " << seed);
  std::mt19937 random(seed);
  for (int i = 0; i < 200; ++i) {
    const UniqueFd fd = RawConnect(guest_.socket());
    std::vector<unsigned char> packet(1 + random() % 100);
    for (unsigned char& byte : packet) byte = static_cast<unsigned char>(random());
    ASSERT_EQ(::send(fd.get(), packet.data(), packet.size(), MSG_NOSIGNAL),
              static_cast<ssize_t>(packet.size()));
    ASSERT_TRUE(IsHungUpOn(fd)) << "packet " << i;
  }
  EXPECT_EQ(guest_.Do(GUEST_STORE, 0, 0, kPages), 0);
  EXPECT_TRUE(Connect().Ping(Soon()).ok());
}

TEST_F(GlueTest, EachFieldOfTheHeaderIsChecked) {
  presync_glue_request good = {};
  good.magic = PRESYNC_GLUE_MAGIC;
  good.version = PRESYNC_GLUE_VERSION;
  good.type = PRESYNC_GLUE_STATUS;
  good.length = sizeof(good);
  std::vector<presync_glue_request> bad(5, good);
  ++bad[0].magic;
  ++bad[1].version;
  bad[2].type = PRESYNC_GLUE_HELLO;
  bad[3].type = 99;
  ++bad[4].length;
  for (const presync_glue_request& request : bad) {
    const UniqueFd fd = RawConnect(guest_.socket());
    ASSERT_EQ(::send(fd.get(), &request, sizeof(request), 0),
              static_cast<ssize_t>(sizeof(request)));
    EXPECT_TRUE(IsHungUpOn(fd));
  }
  const UniqueFd fd = RawConnect(guest_.socket());
  ASSERT_EQ(::send(fd.get(), &good, sizeof(good), 0), static_cast<ssize_t>(sizeof(good)));
  presync_glue_reply reply = {};
  EXPECT_EQ(::recv(fd.get(), &reply, sizeof(reply), 0), static_cast<ssize_t>(sizeof(reply)));
}

TEST_F(GlueTest, OnlySharedMemoryOfTheProcessIsTracked) {
  GlueClient client = Connect();
  const uint64_t ram = RamAddress(&client);
  const uint64_t bytes = PagesToBytes(kPages);
  struct {
    uint64_t start, bytes;
    absl::StatusCode code;
  } const cases[] = {
      {ram + 1, bytes, absl::StatusCode::kInternal},  // not aligned
      {ram, bytes - 1, absl::StatusCode::kInternal},
      {ram, 0, absl::StatusCode::kInternal},
      {~uint64_t{0} - 4095, 8192, absl::StatusCode::kInternal},   // wraps
      {ram, bytes << 20, absl::StatusCode::kFailedPrecondition},  // more than there is
      {kPageBytes, 4096, absl::StatusCode::kFailedPrecondition},  // nothing there
      {ram - kPageBytes, bytes, absl::StatusCode::kFailedPrecondition},
  };
  for (const auto& c : cases) {
    const auto range = client.Track(c.start, c.bytes, GlueMode::kAsync, Soon());
    EXPECT_EQ(range.status().code(), c.code) << range.status();
  }
  EXPECT_EQ(client.Untrack(ram, bytes, Soon()).code(), absl::StatusCode::kFailedPrecondition);
}

TEST_F(GlueTest, RangesAreKeptForTheNextClient) {
  uint64_t ram;
  {
    GlueClient client = Connect();
    ram = RamAddress(&client);
    const auto range = client.Track(ram, PagesToBytes(kPages), GlueMode::kAsync, Soon());
    if (absl::IsUnimplemented(range.status())) GTEST_SKIP() << range.status();
    ASSERT_TRUE(range.ok()) << range.status();
    EXPECT_EQ(client.Track(ram, PagesToBytes(2), GlueMode::kAsync, Soon()).status().code(),
              absl::StatusCode::kFailedPrecondition)
        << "an overlapping range";
    EXPECT_EQ(client.Track(ram, PagesToBytes(kPages), GlueMode::kHandler, Soon()).status().code(),
              absl::StatusCode::kFailedPrecondition)
        << "another mode";
  }
  GlueClient next = Connect();
  EXPECT_EQ(next.ranges(), 1u);
  EXPECT_TRUE(next.Track(ram, PagesToBytes(kPages), GlueMode::kAsync, Soon()).ok());
  EXPECT_TRUE(next.Untrack(ram, PagesToBytes(kPages), Soon()).ok());
  EXPECT_TRUE(next.Track(ram, PagesToBytes(2), GlueMode::kAsync, Soon()).ok());
}

TEST_F(GlueTest, HandlerCountsItsBatchesAndRests) {
  GlueClient client = Connect();
  const uint64_t ram = RamAddress(&client);
  auto range = client.Track(ram, PagesToBytes(kPages), GlueMode::kHandler, Soon());
  if (absl::IsPermissionDenied(range.status())) GTEST_SKIP() << range.status();
  ASSERT_TRUE(range.ok()) << range.status();
  ASSERT_EQ(::ftruncate(range->bitmap.get(), 0), -1) << "the bitmap can't be pulled away from QEMU";

  uffdio_writeprotect protect = {{ram, PagesToBytes(kPages)}, UFFDIO_WRITEPROTECT_MODE_WP};
  ASSERT_EQ(::ioctl(range->uffd.get(), UFFDIO_WRITEPROTECT, &protect), 0);
  ASSERT_EQ(guest_.Do(GUEST_STORE, 0, 0, 10), 0);
  auto bitmap = SharedBitmap::Map(range->bitmap.get(), kPages);
  ASSERT_TRUE(bitmap.ok()) << bitmap.status();
  ASSERT_TRUE(bitmap->AwaitBatch(Soon()).ok());
  EXPECT_EQ(bitmap->TakeWord(0), 0x3ffu);
  presync_glue_bitmap header = {};
  ASSERT_EQ(::pread(range->bitmap.get(), &header, sizeof(header), 0),
            static_cast<ssize_t>(sizeof(header)));
  EXPECT_EQ(header.events, 10u);
  EXPECT_EQ(header.batches, 20u) << "one writer: a fault a batch, odd and even again";
  EXPECT_EQ(header.broken, 0u);
}

// Many rounds: the writer has to be caught waiting while the range goes, and the client keeps its
// descriptor, whose closing would let the writer go as well.
TEST_F(GlueTest, UntrackLetsAWaitingWriterGo) {
  GlueClient client = Connect();
  const uint64_t ram = RamAddress(&client);
  for (int round = 0; round < 50; ++round) {
    auto range = client.Track(ram, PagesToBytes(kPages), GlueMode::kHandler, Soon());
    if (absl::IsPermissionDenied(range.status())) GTEST_SKIP() << range.status();
    ASSERT_TRUE(range.ok()) << range.status();
    uffdio_writeprotect protect = {{ram, PagesToBytes(kPages)}, UFFDIO_WRITEPROTECT_MODE_WP};
    ASSERT_EQ(::ioctl(range->uffd.get(), UFFDIO_WRITEPROTECT, &protect), 0);
    guest_.Send(GUEST_STORE, 0, 0, kPages);
    ASSERT_TRUE(client.Untrack(ram, PagesToBytes(kPages), Soon()).ok());
    ASSERT_EQ(guest_.Answer(), 0);
  }
}

TEST(SharedBitmapTest, WaitsForABatchUnderWay) {
  UniqueFd file(::memfd_create("bitmap", MFD_CLOEXEC | MFD_ALLOW_SEALING));
  presync_glue_bitmap header = {};
  header.bytes = PagesToBytes(100);
  header.batches = 7;
  ASSERT_EQ(::ftruncate(file.get(), 8192), 0);
  ASSERT_EQ(::pwrite(file.get(), &header, sizeof(header), 0), static_cast<ssize_t>(sizeof(header)));
  // One that QEMU could cut short under our feet.
  EXPECT_EQ(SharedBitmap::Map(file.get(), 100).status().code(), absl::StatusCode::kInvalidArgument);
  ASSERT_EQ(::fcntl(file.get(), F_ADD_SEALS, F_SEAL_SHRINK), 0);
  EXPECT_EQ(SharedBitmap::Map(file.get(), 99).status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(SharedBitmap::Map(file.get(), 1 << 20).status().code(),
            absl::StatusCode::kInvalidArgument);
  auto bitmap = SharedBitmap::Map(file.get(), 100);
  ASSERT_TRUE(bitmap.ok()) << bitmap.status();
  EXPECT_EQ(bitmap->AwaitBatch(MonotonicNow()).code(), absl::StatusCode::kDeadlineExceeded);
  std::thread handler([&] {
    const uint32_t next = 8;
    EXPECT_EQ(::pwrite(file.get(), &next, sizeof(next), offsetof(presync_glue_bitmap, batches)), 4);
  });
  EXPECT_TRUE(bitmap->AwaitBatch(Soon()).ok());
  handler.join();

  const uint64_t words[2] = {~uint64_t{0}, ~uint64_t{0}};
  ASSERT_EQ(::pwrite(file.get(), words, sizeof(words), PRESYNC_GLUE_BITMAP_OFFSET), 16);
  bitmap->Clear({60, 8});
  EXPECT_EQ(bitmap->TakeWord(0), ~uint64_t{0} >> 4);
  EXPECT_EQ(bitmap->TakeWord(1), ~uint64_t{0} << 4);
  EXPECT_EQ(bitmap->TakeWord(1), 0u);
}

presync_glue_reply GoodHello() {
  presync_glue_reply hello = {};
  hello.magic = PRESYNC_GLUE_MAGIC;
  hello.version = PRESYNC_GLUE_VERSION;
  hello.type = PRESYNC_GLUE_HELLO;
  hello.length = sizeof(hello);
  hello.pid = static_cast<uint32_t>(::getpid());
  return hello;
}

ProcessIdentity Self() { return IdentifyProcess(::getpid()); }

TEST(GlueClientTest, NobodyThere) {
  const TempFolder folder;
  const auto client = GlueClient::Connect(folder.path() + "/none", Self(), Soon());
  EXPECT_EQ(client.status().code(), absl::StatusCode::kNotFound);
  EXPECT_THAT(client.status().message(), HasSubstr("-plugin presync_glue.so,socket="));
}

// A listener that accepts no one, or says the wrong things.
class FakeGlue {
 public:
  explicit FakeGlue(const std::string& path) : fd_(::socket(AF_UNIX, SOCK_SEQPACKET, 0)) {
    sockaddr_un address = {};
    address.sun_family = AF_UNIX;
    path.copy(address.sun_path, path.size());
    EXPECT_EQ(::bind(fd_.get(), reinterpret_cast<sockaddr*>(&address), sizeof(address)), 0);
    EXPECT_EQ(::listen(fd_.get(), 4), 0);
  }
  // How many descriptors come with a client's first request; then it is hung up on.
  int CountDescriptors(const presync_glue_reply& hello) {
    const UniqueFd client(::accept(fd_.get(), nullptr, nullptr));
    EXPECT_EQ(::send(client.get(), &hello, sizeof(hello), MSG_NOSIGNAL), ssize_t{sizeof(hello)});
    presync_glue_request request = {};
    iovec data = {&request, sizeof(request)};
    alignas(cmsghdr) char control[CMSG_SPACE(4 * sizeof(int))] = {};
    msghdr message = {};
    message.msg_iov = &data;
    message.msg_iovlen = 1;
    message.msg_control = control;
    message.msg_controllen = sizeof(control);
    EXPECT_EQ(::recvmsg(client.get(), &message, MSG_CMSG_CLOEXEC), ssize_t{sizeof(request)});
    const cmsghdr* const c = CMSG_FIRSTHDR(&message);
    if (c == nullptr) return 0;
    int fd = -1;
    std::memcpy(&fd, CMSG_DATA(c), sizeof(fd));
    ::close(fd);
    return static_cast<int>((c->cmsg_len - CMSG_LEN(0)) / sizeof(int));
  }
  // Greets, and answers the first request with a descriptor of /dev/null.
  void PassDescriptor(const presync_glue_reply& hello, const presync_glue_reply& reply) {
    const UniqueFd client(::accept(fd_.get(), nullptr, nullptr));
    EXPECT_EQ(::send(client.get(), &hello, sizeof(hello), MSG_NOSIGNAL), ssize_t{sizeof(hello)});
    presync_glue_request request = {};
    EXPECT_EQ(::recv(client.get(), &request, sizeof(request), 0), ssize_t{sizeof(request)});
    const UniqueFd null(::open("/dev/null", O_RDWR | O_CLOEXEC));
    const int fd = null.get();
    iovec data = {const_cast<presync_glue_reply*>(&reply), sizeof(reply)};
    alignas(cmsghdr) char control[CMSG_SPACE(sizeof(int))] = {};
    msghdr message = {};
    message.msg_iov = &data;
    message.msg_iovlen = 1;
    message.msg_control = control;
    message.msg_controllen = sizeof(control);
    cmsghdr* const c = CMSG_FIRSTHDR(&message);
    c->cmsg_level = SOL_SOCKET;
    c->cmsg_type = SCM_RIGHTS;
    c->cmsg_len = CMSG_LEN(sizeof(int));
    std::memcpy(CMSG_DATA(c), &fd, sizeof(fd));
    EXPECT_EQ(::sendmsg(client.get(), &message, MSG_NOSIGNAL), ssize_t{sizeof(reply)});
  }
  // What one client has to say before it hangs up.
  ssize_t Hear() {
    const UniqueFd client(::accept(fd_.get(), nullptr, nullptr));
    char bytes[64];
    return ::recv(client.get(), bytes, sizeof(bytes), 0);
  }
  void Say(const void* bytes, size_t count) {
    const UniqueFd client(::accept(fd_.get(), nullptr, nullptr));
    EXPECT_EQ(::send(client.get(), bytes, count, MSG_NOSIGNAL), static_cast<ssize_t>(count));
  }

 private:
  UniqueFd fd_;
};

TEST(GlueClientTest, SilenceEndsAtTheDeadline) {
  const TempFolder folder;
  const FakeGlue fake(folder.path() + "/glue");
  EXPECT_EQ(
      GlueClient::Connect(folder.path() + "/glue", Self(), MonotonicNow() + absl::Milliseconds(50))
          .status()
          .code(),
      absl::StatusCode::kDeadlineExceeded);
}

// What opens it could be used against the kernel.
TEST(GlueClientTest, TheDeviceIsForTheHandlersLogAlone) {
  const TempFolder folder;
  FakeGlue fake(folder.path() + "/glue");
  const bool is_there = UniqueFd(::open("/dev/userfaultfd", O_RDWR | O_CLOEXEC)).valid();
  for (const GlueMode mode : {GlueMode::kAsync, GlueMode::kHandler}) {
    int descriptors = -1;
    std::thread server([&] { descriptors = fake.CountDescriptors(GoodHello()); });
    absl::StatusOr<GlueClient> client =
        GlueClient::Connect(folder.path() + "/glue", Self(), Soon());
    ASSERT_TRUE(client.ok()) << client.status();
    EXPECT_FALSE(client->MakeScratch(mode, Soon()).ok());
    server.join();
    EXPECT_EQ(descriptors, is_there && mode == GlueMode::kHandler ? 1 : 0);
  }
}

TEST(GlueClientTest, OnlyAUserfaultfdIsTakenForOne) {
  const TempFolder folder;
  FakeGlue fake(folder.path() + "/glue");
  presync_glue_reply scratch = GoodHello();
  scratch.type = PRESYNC_GLUE_SCRATCH;
  scratch.bytes = PRESYNC_GLUE_SCRATCH_PAGES * PRESYNC_GLUE_PAGE_BYTES;
  scratch.fds = 1;
  std::thread server([&] { fake.PassDescriptor(GoodHello(), scratch); });
  absl::StatusOr<GlueClient> client = GlueClient::Connect(folder.path() + "/glue", Self(), Soon());
  ASSERT_TRUE(client.ok()) << client.status();
  const absl::Status refused = client->MakeScratch(GlueMode::kAsync, Soon()).status();
  EXPECT_EQ(refused.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(refused.message(), HasSubstr("no userfaultfd"));
  server.join();
}

// QEMU names the socket. If it is another guest's, nothing is said there.
TEST(GlueClientTest, AnotherProcessIsHungUpOnUnheard) {
  const TempFolder folder;
  FakeGlue fake(folder.path() + "/glue");
  const SyntheticGuest guest(std::vector<GuestRegionSpec>{{8}});
  ssize_t heard = -1;
  std::thread server([&] { heard = fake.Hear(); });
  const absl::Status refused =
      GlueClient::Connect(folder.path() + "/glue", guest.process(), Soon()).status();
  server.join();
  EXPECT_EQ(refused.code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_THAT(refused.message(), HasSubstr("not this guest's QEMU"));
  EXPECT_EQ(heard, 0);
}

TEST(GlueClientTest, AProcessWithTheSameNumberIsAnother) {
  const TempFolder folder;
  FakeGlue fake(folder.path() + "/glue");
  ProcessIdentity earlier = Self();
  --earlier.start_ticks;
  std::thread server([&] { fake.Hear(); });
  EXPECT_EQ(GlueClient::Connect(folder.path() + "/glue", earlier, Soon()).status().code(),
            absl::StatusCode::kFailedPrecondition);
  server.join();
}

TEST(GlueClientTest, AnotherProtocolIsRefused) {
  const TempFolder folder;
  FakeGlue fake(folder.path() + "/glue");
  presync_glue_reply good = {};
  good.magic = PRESYNC_GLUE_MAGIC;
  good.version = PRESYNC_GLUE_VERSION;
  good.type = PRESYNC_GLUE_HELLO;
  good.length = sizeof(good);
  std::vector<presync_glue_reply> bad(5, good);
  ++bad[0].magic;
  ++bad[1].version;
  ++bad[2].type;
  ++bad[3].length;
  bad[4].fds = 2;  // and carries none
  for (const presync_glue_reply& reply : bad) {
    std::thread server([&] { fake.Say(&reply, sizeof(reply)); });
    EXPECT_EQ(GlueClient::Connect(folder.path() + "/glue", Self(), Soon()).status().code(),
              absl::StatusCode::kInvalidArgument);
    server.join();
  }
  std::thread server([&] { fake.Say(&good, sizeof(good) - 1); });
  EXPECT_EQ(GlueClient::Connect(folder.path() + "/glue", Self(), Soon()).status().code(),
            absl::StatusCode::kInvalidArgument);
  server.join();
  std::thread right([&] { fake.Say(&good, sizeof(good)); });
  EXPECT_TRUE(GlueClient::Connect(folder.path() + "/glue", Self(), Soon()).ok());
  right.join();
}

TEST(ProbeTest, RegionsMustBeInOrderAndOnSmallPages) {
  ProbeOptions options;
  EXPECT_EQ(ProbeDirtyLog(options).status().code(), absl::StatusCode::kInvalidArgument);
  options.regions.push_back({"a", 1, 1, kPageBytes, {1, 10}});
  EXPECT_EQ(ProbeDirtyLog(options).status().code(), absl::StatusCode::kInvalidArgument);
  options.regions[0] = {"a", 1, 1, 2 << 20, {0, 512}};
  EXPECT_THAT(ProbeDirtyLog(options).status().message(), HasSubstr("hugetlbfs"));
  EXPECT_EQ(*ParseDirtyLogMode("uffd-handler"), DirtyLogMode::kUffdHandler);
  EXPECT_THAT(ParseDirtyLogMode("soft-dirty").status().message(), HasSubstr("auto, uffd-async"));
}

}  // namespace
}  // namespace presync
