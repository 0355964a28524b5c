// A sync that goes on after its link, or a presyncd, had gone: only what has to be is sent again,
// and nothing is taken for right that is not known to be. Over real sockets on loopback, with a
// model guest.
#include <sys/socket.h>

#include "tests/transport/sync/session_fixture.h"
#include "transport/clock.h"
#include "transport/sync/conversation.h"
#include "transport/sync/handover_record.h"
#include "transport/wire/version.h"

namespace presync {
namespace {

using ::testing::IsEmpty;

class SessionResumeTest : public SessionTest {
 protected:
  void SyncAll() {
    ASSERT_TRUE(StartSession().ok());
    ASSERT_TRUE(Synced());
  }
  bool Synced() {
    return AwaitState(SessionState::kSyncing) &&
           Await([&] { return session_->status().progress.residual == 0; });
  }
  // The target has noticed that the source is gone.
  bool Lost() {
    return Await([&] {
      const std::vector<TargetStatus> all = service_->status();
      return all.size() == 1 && all[0].state == "lost";
    });
  }
  // As after a kill, or a restart, of the source's presyncd: session and dirty log are gone.
  void LoseSource() {
    session_.reset();
    ASSERT_TRUE(Lost());
  }
  void SyncAWritingGuest() {
    ASSERT_TRUE(StartSession().ok());
    ASSERT_TRUE(AwaitSyncingAtRest());
  }
  ResumptionStatus Resumption() { return session_->status().resumption; }
};

TEST_F(SessionResumeTest, AfterTheSourcesPresyncdWasKilledOnlyWhatChangedIsSent) {
  SyncAll();
  LoseSource();
  for (PageIndex page = 100; page < 110; ++page) source_.Write(page, 7000 + page);
  source_.Write(200, 0);
  source_.scratch().FillPage(701, 1);  // whatever wrote it
  SyncAll();
  EXPECT_EQ(host_.places_made(), 1);
  EXPECT_EQ(session_->status().progress.pages_sent, 11u);
  EXPECT_THAT(Differences(), IsEmpty());
  EXPECT_EQ(Resumption().from, ResumedFrom::kCopy);
  EXPECT_EQ(Resumption().stale_pages, 12u);
  ASSERT_TRUE(Await([&] { return Resumption().caught_up; }));
  EXPECT_GT(Resumption().wire_bytes, 11 * kPageBytes);
  EXPECT_LT(Resumption().wire_bytes, 13 * kPageBytes);
  EXPECT_GT(Resumption().hash_bytes, 0u);
  EXPECT_LT(Resumption().hash_bytes, kPages * 8u);
  EXPECT_EQ(Resumption().all_bytes, Resumption().wire_bytes + Resumption().hash_bytes);
  const absl::StatusOr<HandoverReport> report = Launch();
  ASSERT_TRUE(report.ok()) << report.status();
  EXPECT_THAT(Differences(), IsEmpty());
}

TEST_F(SessionResumeTest, AGuestThatWritesAllTheTimeSurvivesManyRestartsOfItsSource) {
  StartWriting();
  for (int life = 0; life < 6; ++life) {
    ASSERT_TRUE(StartSession().ok());
    ASSERT_TRUE(AwaitSyncingAtRest());
    if (life > 0) {
      EXPECT_EQ(Resumption().from, ResumedFrom::kCopy);
    }
    LoseSource();
  }
  // Also in the middle of a proof.
  for (int life = 0; life < 6; ++life) {
    ASSERT_TRUE(StartSession().ok());
    std::this_thread::sleep_for(std::chrono::milliseconds(5 * life));
    LoseSource();
  }
  EXPECT_EQ(host_.places_made(), 1);
  ASSERT_TRUE(StartSession().ok());
  const absl::StatusOr<HandoverReport> report = Launch();
  ASSERT_TRUE(report.ok()) << report.status();
  EXPECT_EQ(report->pages_differing, 0u);
  EXPECT_THAT(Differences(), IsEmpty());
}

TEST_F(SessionResumeTest, ALinkThatIsLostWhileACopyIsProvenLosesNothing) {
  SyncAll();
  StartWriting();
  for (int round = 0; round < 5; ++round) {
    LoseSource();
    ASSERT_TRUE(StartSession().ok());
    for (int cut = 0; cut < 3; ++cut) {
      std::this_thread::sleep_for(std::chrono::milliseconds(3 + 20 * cut));
      service_->CloseConnections();
    }
    ASSERT_TRUE(AwaitReconnect());
    ASSERT_TRUE(AwaitSyncingAtRest());
  }
  EXPECT_EQ(host_.places_made(), 1);
  // The last cut may not have been noticed yet by a sync that has nothing to send.
  ASSERT_TRUE(Await([&] { return session_->Verify().ok(); }));
  const absl::StatusOr<HandoverReport> report = Launch();
  ASSERT_TRUE(report.ok()) << report.status();
  EXPECT_THAT(Differences(), IsEmpty());
}

TEST_F(SessionResumeTest, OneThatConnectsLaterGoesOnWithTheCopyOnceTheTargetIsThere) {
  SyncAll();
  LoseSource();
  source_.Write(100, 7100);
  *up_ = false;
  source_options_.connect_later = true;
  ASSERT_TRUE(StartSession().ok());
  ASSERT_TRUE(Await([&] { return !session_->status().problem.empty(); }));
  EXPECT_EQ(session_->status().state, SessionState::kConnecting);
  EXPECT_FALSE(session_->AwaitConnected(absl::Milliseconds(1)));
  EXPECT_TRUE(absl::IsFailedPrecondition(session_->Launch({}, absl::ZeroDuration()).status()));
  source_.Write(102, 7102);  // the guest is watched, and nothing is synced yet
  *up_ = true;
  ASSERT_TRUE(session_->AwaitConnected(absl::Seconds(20)));
  ASSERT_TRUE(Synced());
  EXPECT_EQ(session_->status().progress.pages_sent, 2u);
  EXPECT_EQ(Resumption().from, ResumedFrom::kCopy);
  EXPECT_EQ(Resumption().count, 1u);
  EXPECT_THAT(Differences(), IsEmpty());
  ASSERT_TRUE(Launch().ok());
}

TEST_F(SessionResumeTest, OneThatNeverConnectedCanBeStopped) {
  *up_ = false;
  source_options_.connect_later = true;
  ASSERT_TRUE(StartSession().ok());
  EXPECT_TRUE(session_->Stop().ok());
  EXPECT_EQ(session_->status().state, SessionState::kStopped);
}

TEST_F(SessionResumeTest, ALostLinkCostsNothingThatWasConfirmed) {
  SyncAll();
  const uint64_t sent = session_->status().progress.pages_sent;
  service_->CloseConnections();
  ASSERT_TRUE(AwaitReconnect());
  ASSERT_TRUE(Synced());
  EXPECT_EQ(session_->status().progress.pages_sent, sent);
  EXPECT_EQ(Resumption().from, ResumedFrom::kLedger);
  EXPECT_EQ(Resumption().count, 1u);
  EXPECT_EQ(Resumption().stale_pages, 0u);
  EXPECT_EQ(Resumption().hash_bytes, 0u);
}

TEST_F(SessionResumeTest, WhatAPersonStoppedIsForgotten) {
  SyncAll();
  ASSERT_TRUE(session_->Stop().ok());
  session_.reset();
  ASSERT_TRUE(Await([&] { return service_->status().empty(); }));
  SyncAll();
  EXPECT_EQ(host_.places_made(), 2);
  EXPECT_EQ(Resumption().count, 0u);
}

// Loading wrote the memory, and the guest there may have run for all that hashes know.
TEST_F(SessionResumeTest, ACopyWhoseGuestWasLoadedIsNotTakenUp) {
  host_.set_fails("await-loaded");
  SyncAll();
  ASSERT_FALSE(Launch().ok());
  LoseSource();
  host_.set_fails("");
  SyncAll();
  EXPECT_EQ(host_.places_made(), 2);
  EXPECT_EQ(Resumption().count, 0u);
  EXPECT_THAT(Differences(), IsEmpty());
}

TEST_F(SessionResumeTest, ACopyThatNobodyComesBackForIsRemoved) {
  service_.reset();
  target_options_.keep_lost_session = absl::Milliseconds(300);
  StartTarget();
  SyncAll();
  LoseSource();
  EXPECT_TRUE(Await([&] { return service_->status().empty(); }));
  SyncAll();
  EXPECT_EQ(host_.places_made(), 2);
}

// The target says once that its memory is new. A connection that breaks right then, before its link
// is up at the source, must not let it be taken for what it was: the target will call it kept.
TEST_F(SessionResumeTest, NewMemoryIsNotForgottenWhenItsFirstLinkDoesNotComeUp) {
  SyncAll();
  const uint16_t port = port_;
  *up_ = false;
  service_.reset();
  ASSERT_TRUE(AwaitState(SessionState::kConnecting));
  for (PageIndex page = 0; page < kPages; ++page) host_.memory().Write(page, 99 + page);
  StartTarget(port);
  broken_links_ = 1;
  *up_ = true;
  ASSERT_TRUE(Await([&] { return broken_links_ == 0; }));
  const absl::StatusOr<HandoverReport> report = Launch();
  ASSERT_TRUE(report.ok()) << report.status();
  EXPECT_THAT(Differences(), IsEmpty());
}

// The target's presyncd is restarted, and its host keeps what it held.
class TargetRestartTest : public SessionResumeTest {
 protected:
  TargetRestartTest() { host_.set_keeps_copies(); }
  void StopTarget() { service_.reset(); }
  void StartItAgain() { StartTarget(port_); }
};

TEST_F(TargetRestartTest, TheSyncGoesOnWhereItWas) {
  SyncAll();
  const uint64_t sent = session_->status().progress.pages_sent;
  StopTarget();
  for (PageIndex page = 40; page < 45; ++page) source_.Write(page, 5000 + page);
  StartItAgain();
  ASSERT_TRUE(AwaitReconnect());
  ASSERT_TRUE(Synced());
  EXPECT_EQ(host_.places_made(), 1);
  EXPECT_EQ(session_->status().progress.pages_sent, sent + 5);
  EXPECT_EQ(Resumption().from, ResumedFrom::kLedger);
  EXPECT_THAT(Differences(), IsEmpty());
}

TEST_F(TargetRestartTest, WithItsSourceItIsProven) {
  SyncAll();
  LoseSource();
  StopTarget();
  for (PageIndex page = 40; page < 45; ++page) source_.Write(page, 5000 + page);
  StartItAgain();
  SyncAll();
  EXPECT_EQ(host_.places_made(), 1);
  EXPECT_EQ(session_->status().progress.pages_sent, 5u);
  EXPECT_EQ(Resumption().from, ResumedFrom::kCopy);
  EXPECT_THAT(Differences(), IsEmpty());
}

TEST_F(TargetRestartTest, AWritingGuestSurvivesRestartsOfBothSides) {
  SyncAWritingGuest();
  std::mt19937_64 random(11);
  for (int i = 0; i < 12; ++i) {
    const uint64_t who = random() % 3;
    std::this_thread::sleep_for(std::chrono::milliseconds(random() % 60));
    if (who != 1) session_.reset();
    if (who != 0) StopTarget();
    std::this_thread::sleep_for(std::chrono::milliseconds(random() % 20));
    if (who != 0) StartItAgain();
    if (who == 1) {
      ASSERT_TRUE(AwaitReconnect());
    } else {
      ASSERT_TRUE(Lost());
      SyncAWritingGuest();
    }
  }
  ASSERT_TRUE(AwaitSyncingAtRest());
  EXPECT_EQ(host_.places_made(), 1);
  const absl::StatusOr<HandoverReport> report = Launch();
  ASSERT_TRUE(report.ok()) << report.status();
  EXPECT_EQ(report->pages_differing, 0u);
  EXPECT_THAT(Differences(), IsEmpty());
}

TEST_F(TargetRestartTest, ACopyThatNobodyComesBackForAfterARestartIsRemoved) {
  SyncAll();
  LoseSource();
  StopTarget();
  target_options_.keep_lost_session = absl::Milliseconds(300);
  StartItAgain();
  EXPECT_EQ(service_->status().size(), 1u);
  EXPECT_TRUE(Await([&] { return service_->status().empty(); }));
  StopTarget();
  StartItAgain();
  EXPECT_TRUE(service_->status().empty()) << "it is not found again";
}

TEST_F(TargetRestartTest, MemoryThatWasLoadedFromIsNoCopy) {
  host_.set_fails("await-loaded");
  SyncAll();
  EXPECT_TRUE(host_.noted());
  *up_ = false;  // the launch goes over the connection that there is, and none comes after it
  ASSERT_FALSE(Launch().ok());
  ASSERT_TRUE(Lost());
  EXPECT_FALSE(host_.noted()) << "a kill right now must not leave it";
  StopTarget();
  host_.set_fails("");
  StartItAgain();
  EXPECT_TRUE(service_->status().empty());
  *up_ = true;
  ASSERT_TRUE(Synced());
  EXPECT_EQ(host_.places_made(), 2);
  EXPECT_THAT(Differences(), IsEmpty());
}

TEST_F(TargetRestartTest, ACopyWhoseGuestWasToldToRunIsNotTakenUp) {
  SyncAll();
  const SessionId session = *IdFromHex(session_->status().session);
  *up_ = false;
  StopTarget();
  HandoverEntry entry;
  entry.role = HandoverRole::kTarget;
  entry.guest = "g1";
  entry.session = session;
  absl::StatusOr<HandoverRecord> record = HandoverRecord::Reserve(target_folder_.path(), entry);
  ASSERT_TRUE(record.ok()) << record.status();
  ASSERT_TRUE(record->Append(HandoverPhase::kToldToRun).ok());
  StartItAgain();
  EXPECT_TRUE(service_->status().empty());
}

// What an earlier handover of the same guest left at this host. Were a new one let begin beside it,
// a crash in the middle would have recovery run, in the earlier one's name, what waits for the new
// one, while its source still has the guest.
class EarlierHandoverTest : public SessionResumeTest {
 protected:
  HandoverRecord Earlier(HandoverPhase phase) {
    HandoverEntry entry;
    entry.role = HandoverRole::kTarget;
    entry.phase = phase;
    entry.guest = "g1";
    entry.session = RandomId();
    entry.detail = "model";
    return *HandoverRecord::Open(target_folder_.path(), entry);
  }
  std::vector<HandoverPhase> Phases() {
    std::vector<std::string> unreadable;
    std::vector<HandoverPhase> phases;
    for (const HandoverEntry& e : HandoverRecord::ReadAll(target_folder_.path(), &unreadable)) {
      phases.push_back(e.phase);
    }
    return phases;
  }
};

TEST_F(EarlierHandoverTest, OneThatWasToldToRunHereIsAPersonsMatterFirst) {
  HandoverRecord earlier = Earlier(HandoverPhase::kToldToRun);
  const absl::Status refused = StartSession();
  EXPECT_TRUE(absl::IsFailedPrecondition(refused)) << refused;
  EXPECT_THAT(std::string(refused.message()), ::testing::HasSubstr("presync status"));
  EXPECT_EQ(host_.places_made(), 0);
  ASSERT_TRUE(Await([&] { return service_->status().empty(); }));
  ASSERT_TRUE(earlier.Append(HandoverPhase::kRunning).ok());  // presync settle g1 forget
  SyncAll();
}

TEST_F(EarlierHandoverTest, OneThatWaitedIsEndedFirst) {
  Earlier(HandoverPhase::kWaiting);
  host_.set_orphan(absl::DeadlineExceededError("its QEMU does not answer"));
  const absl::Status refused = StartSession();
  EXPECT_THAT(std::string(refused.message()), ::testing::HasSubstr("does not answer"));
  EXPECT_THAT(Phases(), ::testing::ElementsAre(HandoverPhase::kWaiting));
  host_.set_orphan(absl::OkStatus());
  SyncAll();
  EXPECT_EQ(host_.orphans_ended(), 2);
  EXPECT_THAT(Phases(), ::testing::ElementsAre(HandoverPhase::kNeverRan));
}

TEST_F(EarlierHandoverTest, AnotherGuestsAndSettledOnesAreInNobodysWay) {
  Earlier(HandoverPhase::kRunning);
  Earlier(HandoverPhase::kNeverRan);
  HandoverEntry other;
  other.role = HandoverRole::kTarget;
  other.phase = HandoverPhase::kToldToRun;
  other.guest = "g2";
  other.session = RandomId();
  ASSERT_TRUE(HandoverRecord::Open(target_folder_.path(), other).ok());
  SyncAll();
  EXPECT_EQ(host_.orphans_ended(), 0);
}

// Another source speaks for the same guest; nobody has certificates.
class StrangerTest : public SessionResumeTest {
 protected:
  wire::SessionOpened::Content Open(const std::string& peer, uint32_t newest) {
    int fds[2];
    EXPECT_EQ(::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, fds), 0);
    service_->Adopt(UniqueFd(fds[0]), peer);
    const auto preamble = EncodePreamble({.kind = Preamble::Kind::kControl});
    EXPECT_EQ(::write(fds[1], preamble.data(), preamble.size()),
              static_cast<ssize_t>(preamble.size()));
    channel_ = std::make_unique<ControlChannel>(UniqueFd(fds[1]), "the target");
    wire::ControlMessage message;
    message.mutable_hello()->set_newest_version(newest);
    message.mutable_hello()->set_oldest_version(1);
    EXPECT_TRUE(channel_->Send(message, deadline_).ok());
    wire::OpenSession* open = message.mutable_open_session();
    open->set_session_id(IdToBytes(RandomId()));
    open->set_guest("g1");
    open->set_page_bytes(kPageBytes);
    for (const Region& region : source_.memory().regions()) {
      wire::RegionSpec* spec = open->add_regions();
      spec->set_name(region.name());
      spec->set_size_bytes(region.size_bytes());
    }
    EXPECT_TRUE(channel_->Send(message, deadline_).ok());
    EXPECT_TRUE(Expect(channel_.get(), wire::ControlMessage::kHello, deadline_).ok());
    const absl::StatusOr<wire::ControlMessage> opened =
        Expect(channel_.get(), wire::ControlMessage::kSessionOpened, deadline_);
    EXPECT_TRUE(opened.ok()) << opened.status();
    return opened.ok() ? opened->session_opened().content() : wire::SessionOpened::UNKNOWN;
  }
  const absl::Time deadline_ = MonotonicNow() + absl::Seconds(20);
  std::unique_ptr<ControlChannel> channel_;
};

TEST_F(StrangerTest, TheSameHostIsGivenItsOlderCopy) {
  SyncAll();
  LoseSource();
  EXPECT_EQ(Open("127.0.0.1:9", kNewestProtocolVersion), wire::SessionOpened::COPY);
  EXPECT_EQ(host_.places_made(), 1);
}

TEST_F(StrangerTest, AnotherHostIsGivenNewMemory) {
  SyncAll();
  LoseSource();
  EXPECT_NE(Open("127.0.0.2:9", kNewestProtocolVersion), wire::SessionOpened::COPY);
  EXPECT_EQ(host_.places_made(), 2);
}

TEST_F(StrangerTest, AnOlderPresyncIsGivenNewMemory) {
  SyncAll();
  LoseSource();
  EXPECT_NE(Open("127.0.0.1:9", kHashesVersion - 1), wire::SessionOpened::COPY);
  EXPECT_EQ(host_.places_made(), 2);
}

}  // namespace
}  // namespace presync
