// What a session does about what its guest is, apart from its memory.
#include "tests/transport/sync/session_fixture.h"

namespace presync {
namespace {

using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;

class SessionOutlookTest : public SessionTest {
 protected:
  bool AwaitProblem(const std::string& words) {
    return Await([&] { return session_->status().problem.find(words) != std::string::npos; });
  }
};

TEST_F(SessionOutlookTest, WhatStandsInALaunchsWayIsSaidAtOnceAndRefusedBeforeTheGuestIsStopped) {
  ASSERT_TRUE(StartSession().ok());
  ASSERT_TRUE(AwaitState(SessionState::kSyncing));
  EXPECT_TRUE(session_->status().launchable);
  world_.set_outlook(GuestOutlook{.launchable = absl::FailedPreconditionError("a device came"),
                                  .warnings = {"beware"}});
  ASSERT_TRUE(AwaitProblem("a device came"));
  EXPECT_EQ(session_->status().state, SessionState::kSyncing);
  EXPECT_FALSE(session_->status().launchable);
  EXPECT_THAT(session_->status().warnings, ElementsAre("beware"));
  const absl::Status launched = Launch().status();
  EXPECT_TRUE(absl::IsFailedPrecondition(launched)) << launched;
  EXPECT_THAT(std::string(launched.message()), HasSubstr("a device came"));
  EXPECT_EQ(session_->status().reconnects, 0u) << "it never began";
  world_.set_outlook(std::nullopt);
  ASSERT_TRUE(Await([&] { return session_->status().launchable; }));
  EXPECT_THAT(session_->status().problem, IsEmpty());
  EXPECT_TRUE(Launch().ok());
}

TEST_F(SessionOutlookTest, ALaunchLooksAnew) {
  source_options_.watch_every = absl::Hours(1);
  ASSERT_TRUE(StartSession().ok());
  ASSERT_TRUE(AwaitState(SessionState::kSyncing));
  world_.set_outlook(GuestOutlook{.launchable = absl::FailedPreconditionError("a device came")});
  EXPECT_THAT(std::string(Launch().status().message()), HasSubstr("a device came"));
  ExpectUnharmed();
}

TEST_F(SessionOutlookTest, WhatWasWrittenUnseenIsFoundOnceTheWriterIsGone) {
  ASSERT_TRUE(StartSession().ok());
  ASSERT_TRUE(AwaitState(SessionState::kSyncing));
  ASSERT_TRUE(Await([&] { return Differences().empty(); }));
  // Past the log.
  source_.memory().Bytes({5, 1})[7] = std::byte{1};
  source_.memory().Bytes({901, 1})[7] = std::byte{1};
  EXPECT_THAT(Differences(), ElementsAre(5, 901));
  world_.set_outlook(GuestOutlook{.was_written_unseen = true});
  ASSERT_TRUE(AwaitReconnect());
  EXPECT_TRUE(Await([&] { return Differences().empty(); }));
  ASSERT_TRUE(AwaitState(SessionState::kSyncing));
  EXPECT_TRUE(Launch().ok());
}

TEST_F(SessionOutlookTest, ALaunchWaitsForTheProof) {
  source_options_.watch_every = absl::Hours(1);
  ASSERT_TRUE(StartSession().ok());
  ASSERT_TRUE(AwaitState(SessionState::kSyncing));
  ASSERT_TRUE(Await([&] { return Differences().empty(); }));
  source_.memory().Bytes({5, 1})[7] = std::byte{1};
  world_.set_outlook(GuestOutlook{.was_written_unseen = true});
  const absl::Status launched = Launch(/*verify=*/false).status();
  EXPECT_THAT(std::string(launched.message()), HasSubstr("compared again first"));
  ASSERT_TRUE(AwaitReconnect());
  ASSERT_TRUE(AwaitState(SessionState::kSyncing));
  EXPECT_TRUE(Launch(/*verify=*/false).ok());
  EXPECT_THAT(Differences(), IsEmpty());
}

TEST_F(SessionOutlookTest, ALaunchComparesEverythingWhereTheGuestWantsIt) {
  world_.set_outlook(GuestOutlook{.compare_all = true});
  ASSERT_TRUE(StartSession().ok());
  ASSERT_TRUE(AwaitState(SessionState::kSyncing));
  const absl::StatusOr<HandoverReport> report = Launch(/*verify=*/false);
  ASSERT_TRUE(report.ok()) << report.status();
  EXPECT_EQ(report->pages_compared, kPages);
}

TEST_F(SessionOutlookTest, AGuestThatHasEndedEndsItsSyncWithWordsForAPerson) {
  ASSERT_TRUE(StartSession().ok());
  ASSERT_TRUE(AwaitState(SessionState::kSyncing));
  world_.set_outlook(GuestOutlook{.launchable = absl::UnavailableError("its process has ended")});
  ASSERT_TRUE(AwaitState(SessionState::kFailed));
  EXPECT_THAT(session_->status().problem,
              AllOf(HasSubstr("QEMU here has ended"), HasSubstr("presync stop g1")));
  EXPECT_FALSE(session_->status().launchable);
}

// Differs from whatever is not of `machine`.
ShapeComparison DifferFrom(const GuestShape& source, const std::string& machine) {
  if (source.empty() || source[0].value == machine) return {};
  return {.differences = {"machine: " + source[0].value + ", here " + machine}, .warnings = {}};
}

TEST_F(SessionOutlookTest, ATargetThatDoesNotFitIsFoundWhenTheSyncStarts) {
  world_.set_outlook(GuestOutlook{.shape = {{"machine", "q35"}}});
  host_.set_compare([](const GuestShape& source) { return DifferFrom(source, "pc"); });
  const absl::Status started = StartSession();
  EXPECT_TRUE(absl::IsFailedPrecondition(started)) << started;
  EXPECT_THAT(std::string(started.message()),
              AllOf(HasSubstr("machine: q35, here pc"), HasSubstr("presyncd.toml")));
  EXPECT_TRUE(Await([&] { return service_->status().empty(); })) << "the target forgets it";
}

TEST_F(SessionOutlookTest, ATargetThatDoesNotFitAnyMoreIsFoundWhenTheGuestHasChanged) {
  world_.set_outlook(GuestOutlook{.shape = {{"machine", "pc"}}});
  host_.set_compare([](const GuestShape& source) { return DifferFrom(source, "pc"); });
  ASSERT_TRUE(StartSession().ok());
  ASSERT_TRUE(AwaitState(SessionState::kSyncing));
  world_.set_outlook(GuestOutlook{.shape = {{"machine", "pc plus"}}});
  ASSERT_TRUE(AwaitProblem("machine: pc plus, here pc"));
  ASSERT_TRUE(AwaitState(SessionState::kSyncing)) << "the sync goes on";
  EXPECT_FALSE(session_->status().launchable);
  EXPECT_THAT(std::string(Launch().status().message()), HasSubstr("pc plus"));
  ExpectUnharmed();
  world_.set_outlook(GuestOutlook{.shape = {{"machine", "pc"}}});
  ASSERT_TRUE(Await([&] {
    const SessionStatus status = session_->status();
    return status.launchable && status.problem.empty() && status.state == SessionState::kSyncing;
  }));
  EXPECT_TRUE(Launch().ok());
}

TEST_F(SessionOutlookTest, AChangeThatTheTargetHasNotComparedYetForbidsALaunch) {
  source_options_.watch_every = absl::Hours(1);
  world_.set_outlook(GuestOutlook{.shape = {{"machine", "pc"}}});
  ASSERT_TRUE(StartSession().ok());
  ASSERT_TRUE(AwaitState(SessionState::kSyncing));
  world_.set_outlook(GuestOutlook{.shape = {{"machine", "pc plus"}}});
  EXPECT_THAT(std::string(Launch().status().message()), HasSubstr("changed a moment ago"));
  ASSERT_TRUE(AwaitReconnect());
  ASSERT_TRUE(AwaitState(SessionState::kSyncing));
  EXPECT_TRUE(Launch().ok());
}

TEST_F(SessionOutlookTest, WhatQemuWouldNotSayIsAWarning) {
  world_.set_outlook(GuestOutlook{.warnings = {"beware"}, .shape = {{"machine", "pc"}}});
  host_.set_compare([](const GuestShape&) {
    return ShapeComparison{.differences = {}, .warnings = std::vector<std::string>(99, "the disk")};
  });
  ASSERT_TRUE(StartSession().ok());
  const std::vector<std::string> warnings = session_->status().warnings;
  ASSERT_EQ(warnings.size(), 33u) << "no more than 32 of the target's";
  EXPECT_EQ(warnings[0], "beware");
  EXPECT_THAT(warnings[1], AllOf(HasSubstr("another guest"), HasSubstr("the disk")));
  ASSERT_TRUE(AwaitState(SessionState::kSyncing));
  EXPECT_TRUE(Launch().ok());
}

TEST_F(SessionOutlookTest, AShapeThatIsTooLargeIsNotCompared) {
  GuestShape shape(5000, {"machine", "q35"});
  world_.set_outlook(GuestOutlook{.shape = shape});
  host_.set_compare([](const GuestShape& source) { return DifferFrom(source, "pc"); });
  EXPECT_TRUE(StartSession().ok());
}

TEST_F(SessionOutlookTest, AQemuThatCannotLoadTheStateIsQuoted) {
  host_.set_fails("await-loaded");
  host_.set_last_words("Size mismatch: vga.vram");
  ASSERT_TRUE(StartSession().ok());
  ASSERT_TRUE(AwaitState(SessionState::kSyncing));
  EXPECT_THAT(std::string(Launch().status().message()),
              HasSubstr("QEMU's last words: Size mismatch: vga.vram"));
  ExpectUnharmed();
}

// As whoever may write the file can do: without a guard presyncd would end by SIGBUS.
TEST_F(SessionOutlookTest, MemoryOfTheSourceThatIsCutEndsItsSyncOnly) {
  ASSERT_TRUE(StartSession().ok());
  ASSERT_TRUE(AwaitState(SessionState::kSyncing));
  for (const Region& region : source_.memory().regions()) {
    ASSERT_EQ(::ftruncate(region.fd(), 4096), 0);
  }
  for (PageIndex page = 0; page < kPages; page += 3) source_.Write(page, page + 9);
  ASSERT_TRUE(AwaitState(SessionState::kFailed));
  EXPECT_THAT(session_->status().problem,
              AllOf(HasSubstr("was cut to 4096"), HasSubstr("not used")));
  ExpectUnharmed();
}

TEST_F(SessionOutlookTest, ALaunchOfMemoryThatIsCutIsCalledOff) {
  source_options_.watch_every = absl::Hours(1);
  ASSERT_TRUE(StartSession("", /*device_writes=*/3).ok());
  ASSERT_TRUE(AwaitState(SessionState::kSyncing));
  world_.set_outlook(GuestOutlook());
  ASSERT_EQ(::ftruncate(source_.memory().regions()[1].fd(), 0), 0);
  EXPECT_FALSE(Launch(/*verify=*/false).ok());
  ASSERT_TRUE(AwaitState(SessionState::kFailed));
  ExpectUnharmed();
}

TEST_F(SessionOutlookTest, MemoryOfTheTargetThatIsCutEndsThatConversationOnly) {
  ASSERT_TRUE(StartSession().ok());
  ASSERT_TRUE(AwaitState(SessionState::kSyncing));
  for (const Region& region : host_.memory().memory().regions()) {
    ASSERT_EQ(::ftruncate(region.fd(), 4096), 0);
  }
  for (PageIndex page = 0; page < kPages; page += 3) source_.Write(page, page + 9);
  ASSERT_TRUE(AwaitProblem("was cut to 4096"));
  EXPECT_GT(session_->status().reconnects, 0u);
  EXPECT_FALSE(session_->Launch({}, absl::ZeroDuration()).ok());
  ExpectUnharmed();
}

}  // namespace
}  // namespace presync
