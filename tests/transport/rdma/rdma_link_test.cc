// What is the RDMA link's own: who may connect, what may be written, limits of locked memory, and
// peers and paths that go away in the middle.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <linux/capability.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <filesystem>
#include <memory>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include "tests/transport/rdma/rdma_fixture.h"
#include "tests/transport/scratch_memory.h"
#include "transport/clock.h"

namespace presync {
namespace {

using ::testing::HasSubstr;

constexpr absl::Duration kPatience = absl::Seconds(60);
constexpr PageCount kPages = 600;

// Over each device in turn.
class RdmaLinkTest : public ::testing::TestWithParam<TestDevice> {
 protected:
  void SetUp() override {
    source_ram_ = *ScratchMemory::Create({kPages - 100, 100});
    target_ram_ = *ScratchMemory::Create({kPages - 100, 100});
  }

  absl::StatusOr<RdmaPair> Connect(const RdmaSourceOptions& options) {
    return ConnectPair({GetParam().address}, options, source_ram_->memory(), target_ram_->memory());
  }

  absl::StatusOr<std::unique_ptr<RdmaTarget>> Listen(uint32_t queue_pairs = 2) {
    RdmaListen listen = {.addresses = {GetParam().address}, .queue_pairs = queue_pairs};
    listen.token.fill(0x5a);
    return ListenRdma(&target_ram_->memory(), listen);
  }

  // Posts page after page, again and again, until the link says why it no longer works.
  absl::Status WriteUntilItFails(SourceLink* link, LinkEvents* events, size_t* posted) {
    const absl::Time deadline = MonotonicNow() + kPatience;
    PageIndex next = 0;
    while (MonotonicNow() < deadline) {
      while (events->completed.size() == *posted) {
        absl::StatusOr<size_t> n = link->Post(std::vector<PageWrite>{{{next, 20}}});
        if (!n.ok()) return n.status();
        *posted += *n;
        next = (next + 20) % (kPages - 100);
      }
      if (absl::Status s = link->Poll(events); !s.ok()) return s;
      if (absl::Status s = link->Wait(MonotonicNow() + absl::Milliseconds(100)); !s.ok()) return s;
    }
    return absl::DeadlineExceededError("the link still works");
  }

  absl::Status Commit(SourceLink* link, LinkEvents* events) {
    const absl::StatusOr<CommitId> id = link->PostCommit();
    if (!id.ok()) return id.status();
    const absl::Time deadline = MonotonicNow() + kPatience;
    while (true) {
      if (absl::Status s = link->Poll(events); !s.ok()) return s;
      if (events->committed >= *id) break;
      if (MonotonicNow() >= deadline) return absl::DeadlineExceededError("it was not confirmed");
      if (absl::Status s = link->Wait(deadline); !s.ok()) return s;
    }
    return absl::OkStatus();
  }

  std::unique_ptr<ScratchMemory> source_ram_, target_ram_;
};

TEST_P(RdmaLinkTest, NamesItsDevice) {
  absl::StatusOr<std::unique_ptr<RdmaTarget>> target = Listen();
  ASSERT_TRUE(target.ok()) << target.status();
  const absl::StatusOr<RdmaSource> source = ConnectRdma(&source_ram_->memory(), (*target)->offer(),
                                                        TestOptions(2), MonotonicNow() + kPatience);
  ASSERT_TRUE(source.ok()) << source.status();
  EXPECT_EQ(source->devices, std::vector<std::string>{GetParam().name});
  EXPECT_EQ((*target)->offer().endpoints[0].device, GetParam().name);
}

TEST_P(RdmaLinkTest, ADeviceThatIsNotAskedForIsNotUsed) {
  absl::StatusOr<std::unique_ptr<RdmaTarget>> target = Listen();
  ASSERT_TRUE(target.ok()) << target.status();
  RdmaSourceOptions options = TestOptions(2);
  options.devices = {"mlx5_17"};
  const absl::Status status =
      ConnectRdma(&source_ram_->memory(), (*target)->offer(), options, MonotonicNow() + kPatience)
          .status();
  EXPECT_EQ(status.code(), absl::StatusCode::kUnimplemented);
  EXPECT_THAT(std::string(status.message()), HasSubstr(GetParam().name));
}

TEST_P(RdmaLinkTest, AWrongTokenIsRefusedAndTheRightOneStillWorks) {
  absl::StatusOr<std::unique_ptr<RdmaTarget>> target = Listen();
  ASSERT_TRUE(target.ok()) << target.status();
  RdmaOffer wrong = (*target)->offer();
  wrong.token[7] ^= 1;
  const absl::Status refused =
      ConnectRdma(&source_ram_->memory(), wrong, TestOptions(2), MonotonicNow() + kPatience)
          .status();
  EXPECT_EQ(refused.code(), absl::StatusCode::kPermissionDenied) << refused;
  EXPECT_TRUE((*target)->health().ok());
  const absl::StatusOr<RdmaSource> source = ConnectRdma(&source_ram_->memory(), (*target)->offer(),
                                                        TestOptions(2), MonotonicNow() + kPatience);
  ASSERT_TRUE(source.ok()) << source.status();
  EXPECT_TRUE((*target)->AwaitSource(MonotonicNow() + kPatience).ok());
}

TEST_P(RdmaLinkTest, NobodyConnectsOnceAllQueuePairsAreThere) {
  absl::StatusOr<std::unique_ptr<RdmaTarget>> target = Listen();
  ASSERT_TRUE(target.ok()) << target.status();
  const absl::StatusOr<RdmaSource> source = ConnectRdma(&source_ram_->memory(), (*target)->offer(),
                                                        TestOptions(2), MonotonicNow() + kPatience);
  ASSERT_TRUE(source.ok()) << source.status();
  const absl::Status second = ConnectRdma(&source_ram_->memory(), (*target)->offer(),
                                          TestOptions(2), MonotonicNow() + kPatience)
                                  .status();
  EXPECT_EQ(second.code(), absl::StatusCode::kPermissionDenied) << second;
}

// The devices themselves keep a source out of what it has no key for.
class OutsideTheWindow : public RdmaLinkTest {
 protected:
  void ExpectRefused(const RdmaOffer& offer, std::unique_ptr<RdmaTarget> target,
                     const ScratchMemory& spared) {
    const absl::StatusOr<RdmaSource> source =
        ConnectRdma(&source_ram_->memory(), offer, TestOptions(1), MonotonicNow() + kPatience);
    ASSERT_TRUE(source.ok()) << source.status();
    for (PageIndex page = 0; page < kPages; ++page) source_ram_->FillPage(page, 1);
    LinkEvents events;
    size_t posted = 0;
    const absl::Status status = WriteUntilItFails(source->link.get(), &events, &posted);
    EXPECT_EQ(status.code(), absl::StatusCode::kUnavailable) << status;
    EXPECT_EQ(events.committed, 0u);
    for (PageIndex page = 0; page < kPages; ++page) ASSERT_TRUE(spared.IsZeroPage(page)) << page;
    target->Close();
  }
};

TEST_P(OutsideTheWindow, AWrongKeyWritesNothing) {
  absl::StatusOr<std::unique_ptr<RdmaTarget>> target = Listen(1);
  ASSERT_TRUE(target.ok()) << target.status();
  RdmaOffer offer = (*target)->offer();
  for (RdmaWindow& window : offer.endpoints[0].windows) window.key ^= 0x100;
  ExpectRefused(offer, *std::move(target), *target_ram_);
}

TEST_P(OutsideTheWindow, MemoryBesideTheGuestsIsOutOfReach) {
  absl::StatusOr<std::unique_ptr<RdmaTarget>> target = Listen(1);
  ASSERT_TRUE(target.ok()) << target.status();
  RdmaOffer offer = (*target)->offer();
  // This process has that memory, and the first window's key is right: but not for there.
  const auto beside = *ScratchMemory::Create({kPages});
  for (RdmaWindow& window : offer.endpoints[0].windows) {
    window.address = reinterpret_cast<uint64_t>(beside->memory().regions()[0].data());
  }
  ExpectRefused(offer, *std::move(target), *beside);
}

TEST_P(RdmaLinkTest, AnOfferThatDoesNotFitTheGuestIsRefused) {
  absl::StatusOr<std::unique_ptr<RdmaTarget>> target = Listen();
  ASSERT_TRUE(target.ok()) << target.status();
  const RdmaOffer good = (*target)->offer();
  const auto refused = [&](auto change) {
    RdmaOffer offer = good;
    change(&offer.endpoints[0].windows);
    const absl::Status status =
        ConnectRdma(&source_ram_->memory(), offer, TestOptions(2), MonotonicNow() + kPatience)
            .status();
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << status;
  };
  using Windows = std::vector<RdmaWindow>;
  refused([](Windows* windows) { windows->pop_back(); });
  refused([](Windows* windows) { windows->clear(); });
  refused([](Windows* windows) { windows->push_back(windows->back()); });
  refused([](Windows* windows) { (*windows)[0].size_bytes += kPageBytes; });
  refused([](Windows* windows) { (*windows)[0].size_bytes = 0; });
  refused([](Windows* windows) { (*windows)[0].offset_bytes = UINT64_MAX; });
  refused([](Windows* windows) { (*windows)[1].region = 4711; });
}

// rdma_probe as a child: what devices may be used for is decided by the rights that a process had
// when it opened them, and a process that dies must not be this one.
class Probe {
 public:
  // With `limit_bytes` above 0 it may lock no more than that.
  Probe(const std::string& address, const char* mode, rlim_t limit_bytes) {
    const std::string probe =
        std::filesystem::read_symlink("/proc/self/exe").parent_path() / "rdma_probe";
    int fds[2];
    EXPECT_EQ(::pipe(fds), 0);
    pid_ = ::fork();
    if (pid_ == 0) {
      if (limit_bytes > 0) {
        const rlimit low = {.rlim_cur = limit_bytes, .rlim_max = limit_bytes};
        ::setrlimit(RLIMIT_MEMLOCK, &low);
        ::prctl(PR_CAPBSET_DROP, CAP_IPC_LOCK, 0, 0, 0);  // or root would get it by the exec
      }
      ::dup2(fds[1], STDOUT_FILENO);
      ::close(fds[0]);
      ::close(fds[1]);
      ::execl(probe.c_str(), probe.c_str(), address.c_str(), mode, nullptr);
      ::_exit(127);
    }
    ::close(fds[1]);
    char buffer[4096];
    for (ssize_t n; (n = ::read(fds[0], buffer, sizeof(buffer))) > 0;) {
      text_.append(buffer, static_cast<size_t>(n));
    }
    ::close(fds[0]);
  }
  ~Probe() { Kill(); }

  // What it has printed until it closed its output.
  const std::string& text() const { return text_; }
  void Kill() {
    if (pid_ <= 0) return;
    ::kill(pid_, SIGKILL);
    ::waitpid(pid_, nullptr, 0);
    pid_ = -1;
  }

 private:
  pid_t pid_ = -1;
  std::string text_;
};

// The probe's guest has 600 pages, for each end.
TEST_P(RdmaLinkTest, TooLittleLockableMemoryIsSaidWithItsLimitAndTheRemedy) {
  if (::geteuid() != 0) GTEST_SKIP() << "takes a capability away, which needs root";
  struct Case {
    const char* end;
    rlim_t limit_bytes;
    const char* limit;
  };
  // The second is enough for the target's end, and not for both.
  for (const Case& each : {Case{"target", 1 << 20, "1.0 MiB"}, {"source", 4 << 20, "4.0 MiB"}}) {
    const Probe probe(GetParam().address, nullptr, each.limit_bytes);
    const std::string& text = probe.text();
    EXPECT_THAT(text, HasSubstr(std::string(each.end) + ": RESOURCE_EXHAUSTED"));
    for (const char* part : {"RLIMIT_MEMLOCK", each.limit, "2.3 MiB have to be locked",
                             "LimitMEMLOCK", "ulimit -l", "CAP_IPC_LOCK"}) {
      EXPECT_THAT(text, HasSubstr(part));
    }
  }
  EXPECT_THAT(Probe(GetParam().address, nullptr, 64 << 20).text(), HasSubstr("source: OK"));
}

TEST_P(RdmaLinkTest, RegistrationTellsItsProgressAndCanBeCalledOff) {
  absl::StatusOr<std::unique_ptr<RdmaTarget>> target = Listen();
  ASSERT_TRUE(target.ok()) << target.status();
  RdmaSourceOptions options = TestOptions(2);
  std::vector<uint64_t> done;
  options.progress = [&](uint64_t bytes, uint64_t all) {
    EXPECT_EQ(all, PagesToBytes(kPages));
    done.push_back(bytes);
    return done.size() < 2;
  };
  EXPECT_EQ(
      ConnectRdma(&source_ram_->memory(), (*target)->offer(), options, MonotonicNow() + kPatience)
          .status()
          .code(),
      absl::StatusCode::kCancelled);
  EXPECT_THAT(done, ::testing::ElementsAre(PagesToBytes(kPages - 100), PagesToBytes(kPages)));
}

TEST_P(RdmaLinkTest, AGuestWhosePagesComeAndGoIsNotPinned) {
  absl::StatusOr<std::unique_ptr<RdmaTarget>> target = Listen();
  ASSERT_TRUE(target.ok()) << target.status();
  RdmaSourceOptions options = TestOptions(2);
  options.memory_may_be_discarded = true;
  const absl::Status status =
      ConnectRdma(&source_ram_->memory(), (*target)->offer(), options, MonotonicNow() + kPatience)
          .status();
  EXPECT_EQ(status.code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_THAT(std::string(status.message()), HasSubstr("balloon"));
}

// Pages that follow each other travel together, also when they are posted one by one.
TEST_P(RdmaLinkTest, JoinsPagesThatFollowEachOther) {
  for (PageIndex page = 0; page < kPages; ++page) source_ram_->FillPage(page, page + 1);
  RdmaSourceOptions options = TestOptions(1);
  options.depth = 2;  // 512 pages one by one would never fit two requests
  options.queue_bytes = uint64_t{64} << 20;
  absl::StatusOr<RdmaPair> pair = Connect(options);
  ASSERT_TRUE(pair.ok()) << pair.status();
  std::vector<PageWrite> writes;
  for (PageIndex page = 100; page < 108; ++page) writes.push_back({{page, 1}});
  const absl::StatusOr<size_t> posted = pair->source->Post(writes);
  ASSERT_TRUE(posted.ok()) << posted.status();
  EXPECT_EQ(*posted, writes.size());
  LinkEvents events;
  ASSERT_TRUE(Commit(pair->source.get(), &events).ok());
  EXPECT_EQ(events.completed.size(), writes.size());
  for (PageIndex page = 0; page < kPages; ++page) {
    ASSERT_EQ(source_ram_->PageEquals(page, *target_ram_), page >= 100 && page < 108) << page;
  }
}

TEST_P(RdmaLinkTest, AfterCloseTheKeysAreWorthNothing) {
  for (PageIndex page = 0; page < kPages; ++page) source_ram_->FillPage(page, 1);
  absl::StatusOr<RdmaPair> pair = Connect(TestOptions(2));
  ASSERT_TRUE(pair.ok()) << pair.status();
  const RdmaOffer offer = pair->target->offer();
  pair->target->Close();
  EXPECT_EQ(pair->target->health().code(), absl::StatusCode::kCancelled);
  const absl::Status again =
      ConnectRdma(&source_ram_->memory(), offer, TestOptions(2), MonotonicNow() + absl::Seconds(10))
          .status();
  EXPECT_FALSE(again.ok());
  for (PageIndex page = 0; page < kPages; ++page) ASSERT_TRUE(target_ram_->IsZeroPage(page));
}

// The target is a process of its own, and dies without a word.
TEST_P(RdmaLinkTest, APeerThatIsKilledIsNoticedAndNothingMoreIsConfirmed) {
  Probe target(GetParam().address, "serve", 0);
  std::istringstream said(target.text());
  RdmaOffer offer;
  offer.token.fill(0x5a);
  offer.queue_pairs = 1;
  offer.endpoints.push_back({.address = GetParam().address});
  offer.endpoints[0].windows.resize(2);
  said >> offer.endpoints[0].port;
  for (RdmaWindow& w : offer.endpoints[0].windows) {
    said >> w.region >> w.offset_bytes >> w.size_bytes >> w.address >> w.key;
  }
  ASSERT_TRUE(said) << target.text();
  RdmaSourceOptions options = TestOptions(1);
  options.stall_timeout = absl::Seconds(5);
  const absl::StatusOr<RdmaSource> source =
      ConnectRdma(&source_ram_->memory(), offer, options, MonotonicNow() + kPatience);
  ASSERT_TRUE(source.ok()) << source.status();
  LinkEvents events;
  ASSERT_TRUE(source->link->Post(std::vector<PageWrite>{{{0, 20}}}).ok());
  ASSERT_TRUE(Commit(source->link.get(), &events).ok());
  target.Kill();
  size_t posted = 1;
  (void)source->link->PostCommit();
  const absl::Status status = WriteUntilItFails(source->link.get(), &events, &posted);
  EXPECT_EQ(status.code(), absl::StatusCode::kUnavailable) << status;
  EXPECT_EQ(events.committed, 1u);
  EXPECT_EQ(source->link->Poll(&events).code(), absl::StatusCode::kUnavailable);
}

// The path goes away under a link that writes.
TEST_P(RdmaLinkTest, APathThatGoesAwayIsNoticed) {
  if (::geteuid() != 0 || !RdmaIsRequired()) GTEST_SKIP() << "sets network devices down: lab only";
  RdmaSourceOptions options = TestOptions(2);
  options.stall_timeout = absl::Seconds(2);
  absl::StatusOr<RdmaPair> pair = Connect(options);
  ASSERT_TRUE(pair.ok()) << pair.status();
  LinkEvents events;
  ASSERT_TRUE(pair->source->Post(std::vector<PageWrite>{{{0, 20}}}).ok());
  ASSERT_TRUE(Commit(pair->source.get(), &events).ok());
  const PathCut cut(GetParam());
  size_t posted = 1;
  const absl::Status status = WriteUntilItFails(pair->source.get(), &events, &posted);
  EXPECT_EQ(status.code(), absl::StatusCode::kUnavailable) << status;
  EXPECT_EQ(events.committed, 1u);
}

const auto kNameOfDevice = [](const auto& device) { return device.param.name; };
GTEST_ALLOW_UNINSTANTIATED_PARAMETERIZED_TEST(RdmaLinkTest);
INSTANTIATE_TEST_SUITE_P(Devices, RdmaLinkTest, ::testing::ValuesIn(TestDevices()), kNameOfDevice);
GTEST_ALLOW_UNINSTANTIATED_PARAMETERIZED_TEST(OutsideTheWindow);
INSTANTIATE_TEST_SUITE_P(Devices, OutsideTheWindow, ::testing::ValuesIn(TestDevices()),
                         kNameOfDevice);

TEST(RdmaLink, HasADevice) { PRESYNC_NEEDS_RDMA(); }

}  // namespace
}  // namespace presync
