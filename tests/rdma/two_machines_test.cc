// A reduced contract of the RDMA link, with the source in this machine and the target in another
// one: what was confirmed is there, byte for byte. The target is `presync bench link --keep`, which
// serves sessions over scratch memory; it is asked for hashes as a handover with --verify does.
// Environment: PRESYNC_TARGETS, HOST:PORT of that server, once for each RDMA device.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/strings/str_split.h"
#include "tools/bench/bench_target_host.h"
#include "tools/common/units.h"
#include "transport/clock.h"
#include "transport/sync/conversation.h"
#include "transport/sync/memory_comparison.h"
#include "transport/sync/page_hash.h"
#include "transport/sync/source_connection.h"

namespace presync {
namespace {

using ::testing::IsEmpty;

constexpr uint64_t kMemoryBytes = 4 << 20;
constexpr PageCount kPages = kMemoryBytes / kPageBytes;

std::vector<std::string> Targets() {
  const char* targets = std::getenv("PRESYNC_TARGETS");
  if (targets == nullptr) return {};
  return absl::StrSplit(targets, ',');
}

class TwoMachines : public ::testing::TestWithParam<std::string> {
 protected:
  TwoMachines() {
    const HostAndPort target = *ParseHostPort(GetParam(), 7351);
    dialer_ = std::make_unique<TcpDialer>(target.host, target.port,
                                          PeerSecurity{.plain = PlainPeers::kAnyone});
    // The other machine may still be booting.
    for (const absl::Time end = MonotonicNow() + absl::Seconds(120); MonotonicNow() < end;) {
      absl::StatusOr<SourceConnection> connection = Connect();
      status_ = connection.status();
      if (status_.ok()) {
        connection_ = *std::move(connection);
        return;
      }
      std::this_thread::sleep_for(std::chrono::milliseconds(500));
    }
  }

  void SetUp() override { ASSERT_TRUE(status_.ok()) << status_; }

  absl::StatusOr<SourceConnection> Connect() {
    SessionRequest request;
    request.session = RandomId();
    request.guest = "two-machines-" + IdToHex(request.session);
    request.transport = Transport::kRdma;
    request.rdma.queue_pairs = 2;
    request.rdma.queue_bytes = uint64_t{1} << 20;
    request.rdma.stall_timeout = absl::Seconds(30);
    return ConnectSource(dialer_.get(), &memory_, request, MonotonicNow() + absl::Seconds(60));
  }

  // Posts `writes` one after another, each as soon as the link takes it, and a commit.
  void SendAndCommit(absl::Span<const PageWrite> writes) {
    LinkEvents events;
    size_t completed = 0;
    const size_t all = writes.size();
    while (!writes.empty()) {
      absl::StatusOr<size_t> posted = connection_.link->Post(writes);
      ASSERT_TRUE(posted.ok()) << posted.status();
      writes.remove_prefix(*posted);
      ASSERT_NO_FATAL_FAILURE(Collect(&events, &completed));
    }
    const absl::StatusOr<CommitId> commit = connection_.link->PostCommit();
    ASSERT_TRUE(commit.ok()) << commit.status();
    while (events.committed < *commit) ASSERT_NO_FATAL_FAILURE(Collect(&events, &completed));
    EXPECT_EQ(completed, all);
  }

  void Collect(LinkEvents* events, size_t* completed) {
    events->Clear();
    ASSERT_TRUE(connection_.link->Wait(MonotonicNow() + absl::Milliseconds(200)).ok());
    const absl::Status polled = connection_.link->Poll(events);
    ASSERT_TRUE(polled.ok()) << polled;
    *completed += events->completed.size();
  }

  // Pages whose hashes differ between here and there.
  std::vector<PageRun> Differences() {
    const absl::Time deadline = MonotonicNow() + absl::Seconds(60);
    const HashPlan plan = {.run = {0, kPages}};
    EXPECT_TRUE(connection_.channel->Send(MakeHashRequest(plan), deadline).ok());
    const absl::StatusOr<wire::ControlMessage> there =
        Expect(connection_.channel.get(), wire::ControlMessage::kHashReply, deadline);
    const absl::StatusOr<std::string> here = HashPages(memory_, plan);
    if (!there.ok() || !here.ok() || !CheckHashReply(there->hash_reply(), plan).ok()) {
      ADD_FAILURE() << "no hashes: " << there.status() << ", " << here.status();
      return {};
    }
    return DifferingRanges(plan, there->hash_reply().hashes(), *here);
  }

  void Fill(PageRun run, uint64_t seed) {
    std::mt19937_64 random(seed);
    for (std::byte& byte : memory_.Bytes(run)) byte = static_cast<std::byte>(random());
  }

  const GuestMemory memory_ = *MakeScratchMemory("/dev/shm", kMemoryBytes);
  std::unique_ptr<TcpDialer> dialer_;
  absl::Status status_;
  SourceConnection connection_;
};

TEST_P(TwoMachines, WhatIsConfirmedIsThereByteForByte) {
  EXPECT_EQ(connection_.link->name(), "rdma");
  Fill({0, kPages}, 1);
  ASSERT_NO_FATAL_FAILURE(SendAndCommit(std::vector<PageWrite>{{{0, kPages}}}));
  EXPECT_THAT(Differences(), IsEmpty());
}

TEST_P(TwoMachines, ScatteredPagesZeroRunsAndPagesSentAgainArrive) {
  std::mt19937_64 random(2);
  for (int round = 0; round < 4; ++round) {
    std::vector<PageWrite> writes;
    for (PageIndex page = static_cast<PageIndex>(random() % 3); page + 8 < kPages;) {
      const PageRun run = {page, static_cast<PageCount>(1 + random() % 6)};
      const bool zero = random() % 4 == 0;
      if (zero) {
        std::memset(memory_.Bytes(run).data(), 0, PagesToBytes(run.count));
      } else {
        Fill(run, random());
      }
      writes.push_back({run, zero});
      page = run.end() + static_cast<PageCount>(1 + random() % 20);
    }
    ASSERT_NO_FATAL_FAILURE(SendAndCommit(writes));
    EXPECT_THAT(Differences(), IsEmpty()) << "round " << round;
  }
}

TEST_P(TwoMachines, AnotherSessionComesAfterOneThatEnded) {
  connection_ = {};
  absl::StatusOr<SourceConnection> again = Connect();
  ASSERT_TRUE(again.ok()) << again.status();
  connection_ = *std::move(again);
  Fill({5, 1}, 3);
  ASSERT_NO_FATAL_FAILURE(SendAndCommit(std::vector<PageWrite>{{{5, 1}}}));
  EXPECT_THAT(Differences(), IsEmpty());
}

GTEST_ALLOW_UNINSTANTIATED_PARAMETERIZED_TEST(TwoMachines);
INSTANTIATE_TEST_SUITE_P(Devices, TwoMachines, ::testing::ValuesIn(Targets()),
                         [](const auto& target) { return std::to_string(target.index); });

}  // namespace
}  // namespace presync
