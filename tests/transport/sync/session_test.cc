// Source session and target service together, over real sockets on loopback, with model guests:
// what a handover promises when everything works, and when any one thing does not.
#include <sys/socket.h>

#include "tests/transport/sync/session_fixture.h"
#include "transport/clock.h"
#include "transport/sync/departures.h"
#include "transport/sync/handover_record.h"
#include "transport/sync/link_messages.h"

namespace presync {
namespace {

using ::testing::HasSubstr;

TEST_F(SessionTest, MovesAWritingGuestByteForByte) {
  StartWriting();
  ASSERT_TRUE(StartSession().ok());
  ASSERT_TRUE(AwaitState(SessionState::kSyncing));
  const absl::StatusOr<HandoverReport> report = Launch();
  ASSERT_TRUE(report.ok()) << report.status();
  EXPECT_TRUE(world_.target_running());
  EXPECT_FALSE(world_.source_running());
  EXPECT_EQ(report->pages_compared, kPages);
  EXPECT_EQ(report->pages_differing, 0u);
  EXPECT_THAT(Differences(), ::testing::IsEmpty());
  EXPECT_TRUE(host_.kept());
  EXPECT_EQ(session_->status().state, SessionState::kMoved);
  std::vector<std::string> unreadable;
  EXPECT_THAT(HandoverRecord::ReadAll(source_folder_.path(), &unreadable), ::testing::IsEmpty())
      << "the source's record is settled";
  EXPECT_FALSE(CheckMayStart(source_folder_.path(), "g1").ok()) << "nobody starts it there again";
  EXPECT_TRUE(CheckMayStart(target_folder_.path(), "g1").ok());
}

TEST_F(SessionTest, WhatDeviceCodeWritesWhileItsStateIsSavedArrivesToo) {
  ASSERT_TRUE(StartSession("", /*device_writes=*/333).ok());
  ASSERT_TRUE(Launch().ok());
  EXPECT_THAT(Differences(), ::testing::IsEmpty());
  EXPECT_FALSE(source_.scratch().IsZeroPage(333));
}

class FailingSource : public SessionTest, public ::testing::WithParamInterface<const char*> {};

TEST_P(FailingSource, TheGuestGoesOnHere) {
  ASSERT_TRUE(StartSession(GetParam()).ok());
  const absl::StatusOr<HandoverReport> report = Launch();
  ASSERT_FALSE(report.ok());
  EXPECT_THAT(std::string(report.status().message()), HasSubstr(GetParam()));
  ExpectUnharmed();
}

INSTANTIATE_TEST_SUITE_P(Steps, FailingSource,
                         ::testing::Values("prepare-save", "begin-save", "stop", "finish-save",
                                           "check-ran", "resumed-by-hand"));

class FailingTarget : public SessionTest, public ::testing::WithParamInterface<const char*> {};

TEST_P(FailingTarget, TheGuestGoesOnHereAndALaterLaunchWorks) {
  host_.set_fails(GetParam());
  StartWriting();
  ASSERT_TRUE(StartSession().ok());
  const absl::StatusOr<HandoverReport> report = Launch();
  ASSERT_FALSE(report.ok());
  EXPECT_THAT(std::string(report.status().message()), HasSubstr(GetParam()));
  ExpectUnharmed();

  host_.set_fails("");
  const absl::StatusOr<HandoverReport> again = Launch();
  ASSERT_TRUE(again.ok()) << again.status();
  EXPECT_TRUE(world_.target_running());
  EXPECT_THAT(Differences(), ::testing::IsEmpty());
}

INSTANTIATE_TEST_SUITE_P(Steps, FailingTarget,
                         ::testing::Values("begin-load", "await-loaded", "run"));

TEST_F(SessionTest, GivenUpAndUnansweredTheSourceAsksAndDoesNotResume) {
  host_.set_fails("run-unanswered");
  StartWriting();
  ASSERT_TRUE(StartSession().ok());
  const absl::StatusOr<HandoverReport> report = Launch();
  // The target's word is "told to run", which is not "it runs": the source keeps its copy.
  EXPECT_FALSE(report.ok());
  EXPECT_EQ(session_->status().state, SessionState::kInDoubt);
  EXPECT_THAT(session_->status().problem, HasSubstr("presync settle g1 here"));
  EXPECT_TRUE(world_.target_running());
  EXPECT_FALSE(world_.source_running());
  // What the target's recovery finds.
  std::vector<std::string> unreadable;
  for (const HandoverEntry& entry : HandoverRecord::ReadAll(target_folder_.path(), &unreadable)) {
    ASSERT_EQ(entry.phase, HandoverPhase::kToldToRun);
    ASSERT_TRUE(HandoverRecord::Reserve(target_folder_.path(), entry)
                    ->Append(HandoverPhase::kRunning)
                    .ok());
  }
  ASSERT_TRUE(AwaitState(SessionState::kMoved));
  EXPECT_TRUE(world_.target_running());
  EXPECT_FALSE(world_.source_running());
  EXPECT_THAT(Differences(), ::testing::IsEmpty());
}

// Only a person can know, when the target's record is lost.
TEST_F(SessionTest, GivenUpToATargetWithoutARecordAPersonDecides) {
  for (const bool here : {true, false}) {
    host_.set_fails("run-unanswered");
    ASSERT_TRUE(StartSession().ok());
    ASSERT_TRUE(AwaitState(SessionState::kSyncing));
    const Word word = {.decision = here ? Decision::kRunsHere : Decision::kRunsThere};
    EXPECT_FALSE(session_->Decide(word).ok()) << "nothing is in doubt";
    EXPECT_FALSE(Launch().ok());
    ASSERT_EQ(session_->status().state, SessionState::kInDoubt);
    for (const auto& file : std::filesystem::directory_iterator(target_folder_.path())) {
      std::filesystem::remove(file);
    }
    ASSERT_TRUE(Await([&] {
      return session_->status().problem.find("no record") != std::string::npos;
    })) << session_->status().problem;
    world_.SetRunning(false, !here);
    const absl::StatusOr<std::string> decided = session_->Decide(word);
    EXPECT_TRUE(decided.ok()) << decided.status();
    EXPECT_EQ(world_.source_running(), here);
    EXPECT_EQ(session_->status().state == SessionState::kMoved, !here);
    EXPECT_TRUE(!here || session_->Stop().ok());
  }
}

// Two ran, and nobody noticed: only a guest with a manager was held still.
TEST_F(SessionTest, AGuestInDoubtThatSomebodyResumesIsStoppedAgain) {
  host_.set_fails("run-unanswered");
  ASSERT_TRUE(StartSession().ok());
  EXPECT_FALSE(Launch().ok());
  ASSERT_EQ(session_->status().state, SessionState::kInDoubt);
  world_.SetRunning(false, false);
  world_.SetRunning(true, true);
  EXPECT_TRUE(Await([this] { return !world_.source_running(); }));
  EXPECT_EQ(session_->status().state, SessionState::kInDoubt);
}

// It made two, with the other host up and knowing better.
TEST_F(SessionTest, AWordThatTheTargetContradictsChangesNothing) {
  host_.set_fails("run-unanswered");
  host_.set_orphan(absl::FailedPreconditionError("the guest runs"));
  ASSERT_TRUE(StartSession().ok());
  EXPECT_FALSE(Launch().ok());
  ASSERT_EQ(session_->status().state, SessionState::kInDoubt);
  const absl::StatusOr<std::string> here = session_->Decide({.decision = Decision::kRunsHere});
  EXPECT_TRUE(absl::IsFailedPrecondition(here.status())) << here.status();
  EXPECT_THAT(std::string(here.status().message()), HasSubstr("--force"));
  EXPECT_EQ(session_->status().state, SessionState::kInDoubt);
  EXPECT_FALSE(world_.source_running());
  const absl::StatusOr<std::string> there = session_->Decide({.decision = Decision::kRunsThere});
  EXPECT_TRUE(there.ok()) << there.status();
  EXPECT_THAT(there.value_or(""), HasSubstr("wherever it moved on to"));
  EXPECT_EQ(session_->status().state, SessionState::kMoved);
}

// Its disks are locked as long as it runs there, and changed when they are not any more.
TEST_F(SessionTest, AGuestThatSomebodyRanAtTheTargetIsNotResumedWhenItsDisksAreFree) {
  host_.set_fails("runs-untold");
  world_.set_disks_locked(true);
  ASSERT_TRUE(StartSession().ok());
  EXPECT_FALSE(Launch().ok());
  ASSERT_TRUE(Await([&] {
    return absl::StrContains(session_->status().problem, "look there which of the two");
  })) << session_->status().problem;
  EXPECT_EQ(session_->status().state, SessionState::kStuck);
  world_.set_disks_locked(false);
  absl::SleepFor(absl::Milliseconds(300));
  EXPECT_FALSE(world_.source_running());

  // As "presync settle g1 ran" at the target leaves it.
  std::vector<std::string> unreadable;
  const HandoverEntry entry = HandoverRecord::ReadAll(target_folder_.path(), &unreadable).at(0);
  EXPECT_EQ(entry.phase, HandoverPhase::kRanUntold);
  absl::StatusOr<HandoverRecord> record = HandoverRecord::Reserve(target_folder_.path(), entry);
  ASSERT_TRUE(record.ok());
  ASSERT_TRUE(record->Append(HandoverPhase::kToldToRun).ok());
  ASSERT_TRUE(record->Append(HandoverPhase::kRunning).ok());
  EXPECT_TRUE(Await([&] { return session_->status().state == SessionState::kMoved; }));
  EXPECT_FALSE(world_.source_running());
}

// A target that was told to run it and does not is told to end it.
TEST_F(SessionTest, WhereAPersonSaysHereATargetThatDoesNotRunItEndsIt) {
  host_.set_fails("run-unanswered");
  ASSERT_TRUE(StartSession().ok());
  EXPECT_FALSE(Launch().ok());
  ASSERT_EQ(session_->status().state, SessionState::kInDoubt);
  world_.SetRunning(false, false);  // its QEMU died at once
  const absl::StatusOr<std::string> here = session_->Decide({.decision = Decision::kRunsHere});
  EXPECT_TRUE(here.ok()) << here.status();
  EXPECT_GT(host_.orphans_ended(), 0);
  EXPECT_TRUE(world_.source_running());
  std::vector<std::string> unreadable;
  EXPECT_EQ(HandoverRecord::ReadAll(target_folder_.path(), &unreadable).at(0).phase,
            HandoverPhase::kNeverRan);
}

// Somebody's `cont` ran it while it was loaded: it was said never to have run, and the source went
// on while it still did.
TEST_F(SessionTest, AGuestThatRanUntoldHasEndedBeforeItsSourceGoesOn) {
  host_.set_fails("runs-untold");
  ASSERT_TRUE(StartSession().ok());
  const absl::StatusOr<HandoverReport> report = Launch();
  EXPECT_THAT(std::string(report.status().message()), HasSubstr("runs-untold"));
  ExpectUnharmed();
  std::vector<std::string> unreadable;
  EXPECT_EQ(HandoverRecord::ReadAll(target_folder_.path(), &unreadable).at(0).phase,
            HandoverPhase::kRanUntold);
  host_.set_fails("");
  EXPECT_TRUE(Launch().ok()) << "the next launch begins with another process";
}

TEST_F(SessionTest, APageThatDiffersIsFoundAndTheGuestStays) {
  ASSERT_TRUE(StartSession().ok());
  ASSERT_TRUE(Await([&] { return session_->status().progress.residual == 0; }));
  // Behind dirty tracking's back, as a device with a mapping of its own would.
  source_.scratch().FillPage(801, 4711);
  const absl::StatusOr<HandoverReport> report = Launch();
  ASSERT_FALSE(report.ok());
  EXPECT_EQ(report.status().code(), absl::StatusCode::kDataLoss);
  EXPECT_THAT(std::string(report.status().message()), HasSubstr("first: 801"));
  ExpectUnharmed();
}

TEST_F(SessionTest, ResumesOverALostLinkWithoutSendingEverythingAgain) {
  ASSERT_TRUE(StartSession().ok());
  ASSERT_TRUE(AwaitState(SessionState::kSyncing));
  ASSERT_TRUE(Await([&] { return session_->status().progress.residual == 0; }));
  const uint64_t sent = session_->status().progress.pages_sent;
  service_->CloseConnections();
  ASSERT_TRUE(AwaitReconnect());
  ASSERT_TRUE(AwaitState(SessionState::kSyncing));
  EXPECT_EQ(host_.places_made(), 1);
  source_.Write(5, 12345);
  const absl::StatusOr<HandoverReport> report = Launch();
  ASSERT_TRUE(report.ok()) << report.status();
  EXPECT_LE(session_->status().progress.pages_sent, sent + 1);
  EXPECT_THAT(Differences(), ::testing::IsEmpty());
}

TEST_F(SessionTest, ATargetThatStartsAnewGetsEverythingAgain) {
  ASSERT_TRUE(StartSession().ok());
  ASSERT_TRUE(AwaitState(SessionState::kSyncing));
  const uint16_t port = port_;
  service_.reset();
  for (PageIndex page = 0; page < kPages; ++page) host_.memory().Write(page, 99 + page);
  StartTarget(port);
  ASSERT_TRUE(AwaitReconnect());
  const absl::StatusOr<HandoverReport> report = Launch();
  ASSERT_TRUE(report.ok()) << report.status();
  EXPECT_THAT(Differences(), ::testing::IsEmpty());
}

TEST_F(SessionTest, StopTellsTheTargetToForget) {
  ASSERT_TRUE(StartSession().ok());
  ASSERT_TRUE(AwaitState(SessionState::kSyncing));
  EXPECT_EQ(service_->status().size(), 1u);
  ASSERT_TRUE(session_->Stop().ok());
  EXPECT_TRUE(Await([&] { return service_->status().empty(); }));
  ExpectUnharmed();
  EXPECT_FALSE(Launch().ok());
}

TEST_F(SessionTest, AGuestThatIsNotConfiguredThereIsRefusedWithTheReason) {
  const absl::Status status = StartSession("", -1, "g2");
  EXPECT_EQ(status.code(), absl::StatusCode::kNotFound);
  EXPECT_THAT(std::string(status.message()), HasSubstr("not configured here"));
}

TEST_F(SessionTest, ASecondSourceOfTheSameGuestIsRefused) {
  ASSERT_TRUE(StartSession().ok());
  std::unique_ptr<SourceSession> first = std::move(session_);
  const absl::Status status = StartSession();
  EXPECT_EQ(status.code(), absl::StatusCode::kAlreadyExists) << status;
  session_ = std::move(first);
}

TEST_F(SessionTest, ALaunchBeforeTheFirstPassIsRefusedUnlessItMayWait) {
  ASSERT_TRUE(StartSession().ok());
  HandoverOptions options;
  const absl::StatusOr<HandoverReport> at_once = session_->Launch(options, absl::ZeroDuration());
  if (!at_once.ok()) {  // else the first pass was faster than this test, which is fine
    EXPECT_EQ(at_once.status().code(), absl::StatusCode::kFailedPrecondition);
    EXPECT_THAT(std::string(at_once.status().message()), HasSubstr("first-pass"));
    EXPECT_TRUE(Launch().ok());
  }
}

TEST_F(SessionTest, GarbageAtThePortHarmsNobody) {
  ASSERT_TRUE(StartSession().ok());
  std::mt19937_64 random(3);
  for (int i = 0; i < 20; ++i) {
    absl::StatusOr<UniqueFd> socket =
        Connect("127.0.0.1", port_, MonotonicNow() + absl::Seconds(5));
    ASSERT_TRUE(socket.ok());
    std::string bytes(1 + random() % 5000, '\0');
    for (char& c : bytes) c = static_cast<char>(random());
    if (i % 2 == 0) {  // a good preamble, and garbage behind it
      const auto preamble = EncodePreamble({.kind = Preamble::Kind::kControl});
      bytes.insert(0, reinterpret_cast<const char*>(preamble.data()), preamble.size());
    }
    (void)!::write(socket->get(), bytes.data(), bytes.size());
  }
  ASSERT_TRUE(Launch().ok());
  EXPECT_THAT(Differences(), ::testing::IsEmpty());
}

TEST_F(SessionTest, WithoutRdmaAutoTakesTcpAndSaysWhy) {
  service_.reset();
  target_options_.rdma.enabled = false;
  StartTarget();
  ASSERT_TRUE(StartSession().ok());
  EXPECT_EQ(session_->status().link, "tcp");
  EXPECT_THAT(session_->status().link_reason, HasSubstr("RDMA"));
  EXPECT_TRUE(Launch().ok());
}

TEST_F(SessionTest, RdmaThatWasAskedForAndIsNotThereIsAnError) {
  service_.reset();
  target_options_.rdma.enabled = false;
  StartTarget();
  source_options_.transport = Transport::kRdma;
  const absl::Status status = StartSession();
  EXPECT_EQ(status.code(), absl::StatusCode::kUnimplemented) << status;
}

// What the failed link had under way may still be written until the target has closed it.
TEST(FallToTcp, AFailedLinkIsClosedBeforeTheNextIsOpened) {
  int fds[2];
  ASSERT_EQ(::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, fds), 0);
  const ModelMemory memory(kRegions);
  SourceConnection connection;
  connection.channel = std::make_unique<ControlChannel>(UniqueFd(fds[0]), "the target");
  connection.version = 2;
  connection.link_number = connection.links_opened = 3;
  ControlChannel target(UniqueFd(fds[1]), "the source");
  const absl::Time deadline = MonotonicNow() + absl::Seconds(20);
  TcpDialer nowhere("127.0.0.1", 1);
  absl::Status status;
  std::thread source([&] {
    std::unique_ptr<SourceLink> failed;
    status =
        FallToTcp(&nowhere, &memory.memory(), SessionRequest(), &connection, &failed, deadline);
  });
  const absl::StatusOr<wire::ControlMessage> close = target.Receive(deadline);
  EXPECT_EQ(close.ok() ? close->close_link().link() : 0, 3u);
  // Nothing more until it is closed; what is said about other links does not count.
  EXPECT_TRUE(
      absl::IsDeadlineExceeded(target.Receive(MonotonicNow() + absl::Milliseconds(100)).status()));
  EXPECT_TRUE(target.Send(MakeLinkClosed(2), deadline).ok());
  EXPECT_TRUE(
      absl::IsDeadlineExceeded(target.Receive(MonotonicNow() + absl::Milliseconds(100)).status()));
  EXPECT_TRUE(target.Send(MakeLinkClosed(3), deadline).ok());
  const absl::StatusOr<wire::ControlMessage> open = target.Receive(deadline);
  EXPECT_EQ(open.ok() ? open->open_link().link() : 0, 4u);
  EXPECT_EQ(open.ok() ? open->open_link().kind() : wire::OpenLink::NONE, wire::OpenLink::TCP);
  EXPECT_TRUE(
      target.Send(MakeLinkRefused(4, absl::ResourceExhaustedError("no room")), deadline).ok());
  source.join();
  EXPECT_EQ(status.code(), absl::StatusCode::kResourceExhausted) << status;
}

// The conversation as version 1 has it, from the source's side.
class OldSource : public SessionTest {
 protected:
  std::unique_ptr<ControlChannel> Begin() {
    const absl::StatusOr<uint16_t> port = port_;
    absl::StatusOr<Connection> socket =
        TcpDialer("127.0.0.1", *port).Dial({.kind = Preamble::Kind::kControl}, deadline_);
    EXPECT_TRUE(socket.ok()) << socket.status();
    auto channel = std::make_unique<ControlChannel>(*std::move(socket), "the target");
    wire::ControlMessage hello;
    hello.mutable_hello()->set_newest_version(1);
    hello.mutable_hello()->set_oldest_version(1);
    EXPECT_TRUE(channel->Send(hello, deadline_).ok());
    EXPECT_TRUE(channel->Receive(deadline_).ok());
    wire::ControlMessage open;
    open.mutable_open_session()->set_session_id(IdToBytes(RandomId()));
    open.mutable_open_session()->set_guest("g1");
    open.mutable_open_session()->set_page_bytes(kPageBytes);
    open.mutable_open_session()->set_tcp_streams(1);
    for (const Region& region : source_.memory().regions()) {
      wire::RegionSpec* spec = open.mutable_open_session()->add_regions();
      // The model host has its own names; as in a real sync the source must name them.
      spec->set_name(region.name());
      spec->set_size_bytes(region.size_bytes());
    }
    EXPECT_TRUE(channel->Send(open, deadline_).ok());
    return channel;
  }
  const absl::Time deadline_ = MonotonicNow() + absl::Seconds(20);
};

TEST_F(OldSource, GetsItsOneTcpLink) {
  const std::unique_ptr<ControlChannel> channel = Begin();
  const absl::StatusOr<wire::ControlMessage> opened = channel->Receive(deadline_);
  ASSERT_TRUE(opened.ok()) << opened.status();
  ASSERT_EQ(opened->session_opened().tcp_streams(), 1u) << opened->refused().text();
  const absl::StatusOr<Connection> stream =
      TcpDialer("127.0.0.1", port_)
          .Dial({.kind = Preamble::Kind::kData,
                 .token = *IdFromBytes(opened->session_opened().token())},
                deadline_);
  ASSERT_TRUE(stream.ok());
  const absl::StatusOr<wire::ControlMessage> ready = channel->Receive(deadline_);
  ASSERT_TRUE(ready.ok());
  EXPECT_TRUE(ready->has_link_ready());
}

TEST_F(OldSource, MayNotOpenLinks) {
  const std::unique_ptr<ControlChannel> channel = Begin();
  const absl::StatusOr<wire::ControlMessage> opened = channel->Receive(deadline_);
  ASSERT_TRUE(opened.ok());
  const absl::StatusOr<Connection> stream =
      TcpDialer("127.0.0.1", port_)
          .Dial({.kind = Preamble::Kind::kData,
                 .token = *IdFromBytes(opened->session_opened().token())},
                deadline_);
  ASSERT_TRUE(channel->Receive(deadline_).ok());
  wire::ControlMessage open;
  open.mutable_open_link()->set_link(1);
  open.mutable_open_link()->set_kind(wire::OpenLink::TCP);
  ASSERT_TRUE(channel->Send(open, deadline_).ok());
  const absl::StatusOr<wire::ControlMessage> refused = channel->Receive(deadline_);
  ASSERT_TRUE(refused.ok());
  EXPECT_TRUE(refused->has_refused());
}

}  // namespace
}  // namespace presync
