// What else than a link touches a copy: then it is not taken for what it was. And whose memory is
// held for how long. Over real sockets on loopback, with a model guest.
#include <fcntl.h>

#include <fstream>

#include "absl/strings/match.h"
#include "tests/transport/sync/session_fixture.h"

namespace presync {
namespace {

using ::testing::IsEmpty;

class SessionCopyTest : public SessionTest {
 protected:
  bool Synced() {
    return AwaitState(SessionState::kSyncing) &&
           Await([&] { return session_->status().progress.residual == 0; });
  }
  // As a QEMU with discard-data=on does when it ends in order, or somebody by hand.
  void FreeOnTarget(PageRun run) {
    const GuestMemory& memory = host_.memory().memory();
    const Region& region = memory.regions()[memory.RegionOf(run.first)];
    const PageIndex first = run.first - memory.FirstPage(memory.RegionOf(run.first));
    ASSERT_EQ(::fallocate(region.fd(), FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
                          static_cast<off_t>(PagesToBytes(first)),
                          static_cast<off_t>(PagesToBytes(run.count))),
              0);
  }
  void FreeAllOnTarget() {
    FreeOnTarget({0, kRegions[0]});
    FreeOnTarget({kRegions[0], kRegions[1]});
  }
  // The sync goes on by itself, so one of these comes through.
  absl::StatusOr<HandoverReport> LaunchUntilItWorks() {
    absl::StatusOr<HandoverReport> report = absl::UnknownError("not launched");
    Await([&] {
      report = Launch(/*verify=*/false);
      return report.ok();
    });
    return report;
  }
  // How often this process maps the source guest's memory.
  int Mappings() {
    std::string path = "/proc/self/fd/" + std::to_string(source_.memory().regions()[0].fd());
    path = std::filesystem::read_symlink(path);
    std::ifstream maps("/proc/self/maps");
    int mappings = 0;
    for (std::string line; std::getline(maps, line);) mappings += absl::StrContains(line, path);
    return mappings;
  }
};

TEST_F(SessionCopyTest, ACopyThatWasEmptiedIsNotLaunched) {
  ASSERT_TRUE(StartSession().ok());
  ASSERT_TRUE(Synced());
  FreeAllOnTarget();
  const absl::StatusOr<HandoverReport> report = LaunchUntilItWorks();
  ASSERT_TRUE(report.ok()) << report.status();
  EXPECT_THAT(Differences(), IsEmpty());
}

TEST_F(SessionCopyTest, OnePageThatWasFreedIsEnough) {
  ASSERT_TRUE(StartSession().ok());
  ASSERT_TRUE(Synced());
  FreeOnTarget({702, 1});
  const absl::StatusOr<HandoverReport> report = LaunchUntilItWorks();
  ASSERT_TRUE(report.ok()) << report.status();
  EXPECT_THAT(Differences(), IsEmpty());
}

TEST_F(SessionCopyTest, ItIsNoticedLongBeforeALaunchAndSaid) {
  std::mutex mutex;
  std::string log;
  service_.reset();
  target_options_.log = [&](bool, const std::string& line) {
    std::lock_guard<std::mutex> lock(mutex);
    log += line + "\n";
  };
  StartTarget();
  ASSERT_TRUE(StartSession().ok());
  ASSERT_TRUE(Synced());
  FreeAllOnTarget();
  ASSERT_TRUE(AwaitReconnect());
  ASSERT_TRUE(Synced());
  EXPECT_THAT(Differences(), IsEmpty());
  session_.reset();
  service_.reset();
  EXPECT_THAT(log, ::testing::HasSubstr("discard-data=on"));
}

TEST_F(SessionCopyTest, EmptiedWhileNoPresyncdLivedItIsNotTakenUp) {
  host_.set_keeps_copies();
  ASSERT_TRUE(StartSession().ok());
  ASSERT_TRUE(Synced());
  service_.reset();
  FreeAllOnTarget();
  StartTarget(port_);
  ASSERT_TRUE(AwaitReconnect());
  ASSERT_TRUE(Synced());
  EXPECT_THAT(Differences(), IsEmpty());
  ASSERT_TRUE(Launch().ok());
}

// A process that crashes or is killed has the memory mapped until then.
TEST_F(SessionCopyTest, WhatAWaitingGuestThatEndedByItselfLeavesIsProven) {
  ASSERT_TRUE(StartSession().ok());
  ASSERT_TRUE(Synced());
  host_.memory().scratch().FillPage(99, 12345);
  host_.set_waiting_gone();
  ASSERT_TRUE(AwaitReconnect());
  ASSERT_TRUE(Synced());
  EXPECT_EQ(session_->status().resumption.from, ResumedFrom::kCopy);
  EXPECT_EQ(host_.places_made(), 1);
  EXPECT_THAT(Differences(), IsEmpty());
  ASSERT_TRUE(Launch().ok());
}

TEST_F(SessionCopyTest, OneThatEndsInALaunchIsNoticedThere) {
  ASSERT_TRUE(StartSession().ok());
  ASSERT_TRUE(Synced());
  host_.memory().scratch().FillPage(99, 12345);
  host_.set_waiting_gone();
  const absl::StatusOr<HandoverReport> report = LaunchUntilItWorks();
  ASSERT_TRUE(report.ok()) << report.status();
  EXPECT_THAT(Differences(), IsEmpty());
}

TEST_F(SessionCopyTest, AGuestThatHasLeftLeavesNoMemoryHere) {
  const int before = Mappings();
  ASSERT_TRUE(StartSession().ok());
  ASSERT_TRUE(Synced());
  EXPECT_GT(Mappings(), before);
  ASSERT_TRUE(Launch().ok());
  EXPECT_EQ(session_->status().state, SessionState::kMoved);
  EXPECT_TRUE(Await([&] { return Mappings() == before; })) << Mappings();
  EXPECT_EQ(session_->pages(), kPages);
}

TEST_F(SessionCopyTest, NorDoesASyncThatWasStopped) {
  const int before = Mappings();
  ASSERT_TRUE(StartSession().ok());
  ASSERT_TRUE(Synced());
  ASSERT_TRUE(session_->Stop().ok());
  EXPECT_EQ(Mappings(), before);
}

TEST_F(SessionCopyTest, NorOneThatFailed) {
  const int before = Mappings();
  ASSERT_TRUE(StartSession().ok());
  ASSERT_TRUE(Synced());
  source_.Die();
  ASSERT_TRUE(AwaitState(SessionState::kFailed));
  EXPECT_TRUE(Await([&] { return Mappings() == before; })) << Mappings();
}

}  // namespace
}  // namespace presync
