// What becomes of handover records, rule by rule, with a host that does what the test says.
#include "transport/sync/recovery.h"

#include <fcntl.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <stdlib.h>
#include <sys/stat.h>

#include <filesystem>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "transport/sync/departures.h"

namespace presync {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;

class ScriptedHost final : public RecoveryHost {
 public:
  absl::Status ResumeSource(const HandoverEntry&) override { return Did("resume", resume); }
  absl::Status QuitSource(const HandoverEntry&) override { return Did("quit", quit); }
  // Said only where there was something to hold.
  absl::Status HoldSource(const HandoverEntry&) override {
    return hold.ok() ? hold : Did("hold", hold);
  }
  absl::StatusOr<wire::Outcome> AskTarget(const HandoverEntry& entry, bool end_it) override {
    on_ask(entry);
    if (absl::Status s = Did(end_it ? "ask to end it" : "ask", ask); !s.ok()) return s;
    wire::Outcome outcome;
    outcome.set_value(answer);
    outcome.set_text("as scripted");
    outcome.set_phase(phase);
    return outcome;
  }
  absl::Status EndOrphan(const HandoverEntry&) override { return Did("end", end); }
  absl::Status RunOrphan(const HandoverEntry&) override { return Did("run", run); }
  bool OrphanLives(const HandoverEntry&) override { return orphan_lives; }

  absl::Status resume, quit, hold, ask, end, run;
  wire::Outcome::Value answer = wire::Outcome::UNKNOWN;
  std::string phase;
  bool orphan_lives = true;
  std::function<void(const HandoverEntry&)> on_ask = [](const HandoverEntry&) {};

  std::vector<std::string> calls() const {
    MutexLock lock(&mutex_);
    return calls_;
  }
  void Forget() {
    MutexLock lock(&mutex_);
    calls_.clear();
  }

 private:
  absl::Status Did(const char* call, const absl::Status& status) {
    MutexLock lock(&mutex_);
    calls_.push_back(call);
    return status;
  }
  mutable Mutex mutex_;
  std::vector<std::string> calls_ ABSL_GUARDED_BY(mutex_);
};

class RecoveryTest : public ::testing::Test {
 protected:
  static std::string MakeFolder() {
    char name[] = "/tmp/presync-recovery-test-XXXXXX";
    return ::mkdtemp(name);
  }
  ~RecoveryTest() override { std::filesystem::remove_all(folder_); }

  HandoverEntry Write(HandoverRole role, HandoverPhase phase, const std::string& guest = "g1",
                      const std::string& peer = "b:7350") {
    const HandoverEntry entry = {.role = role,
                                 .phase = phase,
                                 .guest = guest,
                                 .session = RandomId(),
                                 .peer = peer,
                                 .detail = "/run/g1.qmp"};
    EXPECT_TRUE(HandoverRecord::Open(folder_, entry).ok());
    return entry;
  }
  void Append(const HandoverEntry& entry, std::initializer_list<HandoverPhase> phases) {
    absl::StatusOr<HandoverRecord> record = HandoverRecord::Reserve(folder_, entry);
    ASSERT_TRUE(record.ok());
    for (const HandoverPhase phase : phases) ASSERT_TRUE(record->Append(phase).ok());
  }
  static bool NotInUse(const std::string&) { return false; }
  void Pass() { recovery_.Pass(NotInUse); }
  absl::Status Decide(Decision decision, bool force = false) {
    return recovery_.Decide("g1", {.decision = decision, .force = force}, NotInUse).status();
  }
  std::vector<HandoverPhase> Phases() {
    std::vector<std::string> unreadable;
    std::vector<HandoverPhase> phases;
    for (const HandoverEntry& entry : HandoverRecord::ReadAll(folder_, &unreadable)) {
      phases.push_back(entry.phase);
    }
    return phases;
  }
  std::string OpenText() {
    std::string text;
    for (const OpenMatter& matter : recovery_.open()) text += MatterText(matter) + "\n";
    return text;
  }
  std::string Log() {
    MutexLock lock(&log_mutex_);
    return log_;
  }

  const std::string folder_ = MakeFolder();
  ScriptedHost host_;
  BootMoment now_ = NowInBoot();
  Mutex log_mutex_;
  std::string log_ ABSL_GUARDED_BY(log_mutex_);
  std::shared_ptr<GuestClaims> claims_ = std::make_shared<GuestClaims>();
  Recovery recovery_{{.folder = folder_,
                      .now = [this] { return now_; },
                      .claims = claims_,
                      .log =
                          [this](bool, const std::string& line) {
                            MutexLock lock(&log_mutex_);
                            log_ += line + "\n";
                          }},
                     &host_};
};

TEST_F(RecoveryTest, AGuestThatWasNotGivenUpGoesOnHere) {
  Write(HandoverRole::kSource, HandoverPhase::kPreparing);
  Pass();
  EXPECT_THAT(host_.calls(), ElementsAre("resume"));
  EXPECT_THAT(Phases(), IsEmpty());
  EXPECT_THAT(OpenText(), IsEmpty());
}

TEST_F(RecoveryTest, AQemuThatDoesNotAnswerIsTriedAgainUntilItDoes) {
  Write(HandoverRole::kSource, HandoverPhase::kPreparing);
  host_.resume = absl::DeadlineExceededError("no answer");
  Pass();
  EXPECT_THAT(OpenText(), HasSubstr("tried again"));
  EXPECT_FALSE(recovery_.open()[0].for_a_person);
  Pass();
  EXPECT_THAT(Log(), ::testing::ContainsRegex("^[^\n]*\n$")) << "said once";
  host_.resume = absl::OkStatus();
  Pass();
  EXPECT_THAT(OpenText(), IsEmpty());
  EXPECT_THAT(Phases(), IsEmpty());
}

// Its disks are locked as long as it runs there, and changed when they are not any more.
TEST_F(RecoveryTest, AGuestThatSomebodyRanAtTheTargetIsNotResumedWhenItsDisksAreFree) {
  Write(HandoverRole::kSource, HandoverPhase::kPreparing);
  host_.resume = absl::FailedPreconditionError("its disk is locked");
  Pass();
  EXPECT_THAT(host_.calls(), ElementsAre("resume"));
  host_.Forget();
  host_.resume = absl::OkStatus();
  host_.phase = "ran-untold";
  Pass();
  EXPECT_THAT(host_.calls(), ElementsAre("ask"));
  EXPECT_THAT(OpenText(), HasSubstr("which of the two"));
  host_.Forget();
  host_.answer = wire::Outcome::RUNNING;
  host_.phase = "running";
  Pass();
  EXPECT_THAT(host_.calls(), ElementsAre("ask", "quit"));
  EXPECT_THAT(Phases(), IsEmpty());
}

TEST_F(RecoveryTest, GivenUpResumesOnlyOnTheWordThatItNeverRan) {
  Write(HandoverRole::kSource, HandoverPhase::kGivenUp);
  host_.ask = absl::UnavailableError("refused");
  Pass();
  host_.ask = absl::OkStatus();
  host_.answer = wire::Outcome::UNKNOWN;
  Pass();
  EXPECT_THAT(host_.calls(), ElementsAre("ask", "ask"));
  EXPECT_THAT(OpenText(), HasSubstr("presync settle g1 here"));
  EXPECT_THAT(OpenText(), HasSubstr("presync settle g1 there"));
  EXPECT_TRUE(recovery_.open()[0].for_a_person);
  host_.answer = wire::Outcome::NEVER_RAN;
  Pass();
  EXPECT_THAT(host_.calls(), ElementsAre("ask", "ask", "ask", "resume"));
  EXPECT_THAT(Phases(), IsEmpty());
}

TEST_F(RecoveryTest, TheWordThatItNeverRanIsKeptWhenTheGuestCantBeResumedYet) {
  Write(HandoverRole::kSource, HandoverPhase::kGivenUp);
  host_.answer = wire::Outcome::NEVER_RAN;
  host_.resume = absl::DeadlineExceededError("no answer");
  Pass();
  EXPECT_THAT(Phases(), ElementsAre(HandoverPhase::kTakenBack));
}

TEST_F(RecoveryTest, GivenUpAndRunningThereEndsTheOldQemu) {
  Write(HandoverRole::kSource, HandoverPhase::kGivenUp);
  host_.answer = wire::Outcome::RUNNING;
  host_.quit = absl::DeadlineExceededError("no answer");
  Pass();
  EXPECT_THAT(Phases(), ElementsAre(HandoverPhase::kMoved)) << "not asked again";
  host_.quit = absl::OkStatus();
  Pass();
  EXPECT_THAT(host_.calls(), ElementsAre("ask", "quit", "quit", "quit"));
  EXPECT_THAT(Phases(), IsEmpty());
}

// The QEMU at that address stands where the later handover left it: two would run.
TEST_F(RecoveryTest, AnOlderRecordDoesNotResumeAGuestThatALaterHandoverGaveUp) {
  Write(HandoverRole::kSource, HandoverPhase::kPreparing);
  Write(HandoverRole::kTarget, HandoverPhase::kToldToRun);
  Write(HandoverRole::kSource, HandoverPhase::kGivenUp);
  Write(HandoverRole::kSource, HandoverPhase::kPreparing, "another");
  host_.ask = absl::UnavailableError("refused");
  Pass();
  EXPECT_THAT(host_.calls(), ::testing::UnorderedElementsAre("ask", "resume"));
  EXPECT_EQ(recovery_.open().size(), 3u);
}

TEST_F(RecoveryTest, AWaitingGuestNeverRuns) {
  Write(HandoverRole::kTarget, HandoverPhase::kWaiting);
  Pass();
  EXPECT_THAT(host_.calls(), ElementsAre("end"));
  EXPECT_THAT(Phases(), ElementsAre(HandoverPhase::kNeverRan));
}

TEST_F(RecoveryTest, AGuestThatWasToldToRunIsRun) {
  Write(HandoverRole::kTarget, HandoverPhase::kToldToRun);
  host_.run = absl::DeadlineExceededError("no answer");
  Pass();
  EXPECT_FALSE(recovery_.open()[0].for_a_person);
  host_.run = absl::OkStatus();
  Pass();
  EXPECT_THAT(Phases(), ElementsAre(HandoverPhase::kRunning));
}

// Forgotten it read as "it ran", and the source ended the only copy.
TEST_F(RecoveryTest, AGuestThatWasToldToRunAndEndedIsAPersonsMatter) {
  for (const bool ran : {true, false}) {
    const HandoverEntry entry = Write(HandoverRole::kTarget, HandoverPhase::kToldToRun);
    host_.run = absl::NotFoundError("its QEMU has ended");
    Pass();
    EXPECT_TRUE(recovery_.open()[0].for_a_person);
    EXPECT_THAT(OpenText(), HasSubstr("presync settle g1 ran"));
    EXPECT_THAT(OpenText(), HasSubstr("presync settle g1 never-ran"));
    for (const Decision other : {Decision::kRunsHere, Decision::kRunsThere, Decision::kForget}) {
      EXPECT_EQ(Decide(other).code(), absl::StatusCode::kFailedPrecondition);
    }
    EXPECT_THAT(Phases(), ElementsAre(HandoverPhase::kToldToRun));
    EXPECT_TRUE(Decide(ran ? Decision::kRan : Decision::kNeverRan).ok());
    EXPECT_THAT(OpenText(), IsEmpty());
    EXPECT_THAT(Phases(), ElementsAre(ran ? HandoverPhase::kRunning : HandoverPhase::kNeverRan))
        << "its source is told so for ever";
    ASSERT_TRUE(HandoverRecord::Forget(folder_, entry).ok());
  }
}

TEST_F(RecoveryTest, NeverRanIsNotWrittenOfAGuestThatRuns) {
  Write(HandoverRole::kTarget, HandoverPhase::kWaiting);
  host_.end = absl::FailedPreconditionError("the guest runs, though nobody told it to");
  Pass();
  EXPECT_THAT(OpenText(), HasSubstr("presync settle g1 ran"));
  EXPECT_FALSE(Decide(Decision::kNeverRan).ok());
  EXPECT_THAT(Phases(), ElementsAre(HandoverPhase::kWaiting));
  EXPECT_TRUE(Decide(Decision::kRan).ok());
  EXPECT_THAT(Phases(), ElementsAre(HandoverPhase::kRunning));
}

// Ended by hand once it was seen to run, it was said never to have run.
TEST_F(RecoveryTest, AGuestThatSomebodyRanHereIsAPersonsMatterWhileItLives) {
  Write(HandoverRole::kTarget, HandoverPhase::kWaiting);
  host_.end = absl::AlreadyExistsError("the guest runs, though nobody told it to");
  Pass();
  EXPECT_THAT(Phases(), ElementsAre(HandoverPhase::kRanUntold));
  host_.end = absl::OkStatus();
  Pass();
  EXPECT_TRUE(recovery_.open().at(0).for_a_person);
  EXPECT_FALSE(Decide(Decision::kNeverRan).ok()) << "it was seen to run";
  host_.orphan_lives = false;
  Pass();
  EXPECT_THAT(OpenText(), IsEmpty());
  EXPECT_THAT(Phases(), ElementsAre(HandoverPhase::kRanUntold)) << "no source is told otherwise";
  EXPECT_TRUE(Decide(Decision::kNeverRan, /*force=*/true).ok());
  EXPECT_THAT(Phases(), ElementsAre(HandoverPhase::kNeverRan));
}

TEST_F(RecoveryTest, APersonDecidesWhereAGuestRuns) {
  for (const bool here : {true, false}) {
    Write(HandoverRole::kSource, HandoverPhase::kGivenUp);
    host_.ask = absl::UnavailableError("that host burnt down");
    Pass();
    EXPECT_EQ(Decide(Decision::kForget).code(), absl::StatusCode::kFailedPrecondition);
    EXPECT_EQ(Decide(Decision::kRan).code(), absl::StatusCode::kFailedPrecondition);
    host_.Forget();
    EXPECT_TRUE(Decide(here ? Decision::kRunsHere : Decision::kRunsThere).ok());
    EXPECT_THAT(host_.calls(),
                ElementsAre(here ? "ask to end it" : "ask", here ? "resume" : "quit"));
    EXPECT_THAT(Phases(), IsEmpty());
  }
  EXPECT_EQ(Decide(Decision::kRunsHere).code(), absl::StatusCode::kNotFound);
}

// Whether it is the old guest, resumed by somebody, or another one is not to be told from here.
TEST_F(RecoveryTest, AQemuAtTheAddressOfAGuestThatMovedIsForgottenByAPerson) {
  Write(HandoverRole::kSource, HandoverPhase::kMoved);
  host_.quit = absl::FailedPreconditionError("it may be another guest");
  Pass();
  EXPECT_THAT(OpenText(), HasSubstr("it may be another guest"));
  for (const Decision other : {Decision::kRan, Decision::kNeverRan, Decision::kRunsHere}) {
    EXPECT_EQ(Decide(other).code(), absl::StatusCode::kFailedPrecondition);
  }
  host_.Forget();
  EXPECT_TRUE(Decide(Decision::kForget).ok());
  EXPECT_THAT(host_.calls(), IsEmpty()) << "it is left alone";
  EXPECT_THAT(Phases(), IsEmpty());
}

// With the other host up and knowing better it made two, or none.
TEST_F(RecoveryTest, AWordThatTheTargetContradictsNeedsForce) {
  struct Case {
    Decision word;
    wire::Outcome::Value answer;
    const char* phase;
    bool fits;
  };
  for (const Case& c : {Case{Decision::kRunsHere, wire::Outcome::RUNNING, "running", false},
                        Case{Decision::kRunsHere, wire::Outcome::UNKNOWN, "told-to-run", false},
                        Case{Decision::kRunsHere, wire::Outcome::UNKNOWN, "", true},
                        Case{Decision::kRunsHere, wire::Outcome::NEVER_RAN, "never-ran", true},
                        Case{Decision::kRunsThere, wire::Outcome::NEVER_RAN, "never-ran", false},
                        Case{Decision::kRunsThere, wire::Outcome::UNKNOWN, "told-to-run", true},
                        Case{Decision::kRunsThere, wire::Outcome::RUNNING, "running", true}}) {
    Write(HandoverRole::kSource, HandoverPhase::kGivenUp);
    host_.answer = c.answer;
    host_.phase = c.phase;
    host_.Forget();
    const absl::Status decided = Decide(c.word);
    EXPECT_EQ(decided.ok(), c.fits) << decided << c.phase;
    if (!c.fits) {
      EXPECT_THAT(std::string(decided.message()), HasSubstr("--force"));
      EXPECT_THAT(Phases(), ElementsAre(HandoverPhase::kGivenUp)) << "nothing was changed";
      EXPECT_TRUE(Decide(c.word, /*force=*/true).ok());
    }
    EXPECT_THAT(Phases(), IsEmpty());
  }
}

// A millisecond after it was taken back the word that it runs there had the only guest ended.
TEST_F(RecoveryTest, AWordThatComesAfterItWasSettledChangesNothing) {
  const HandoverEntry entry = Write(HandoverRole::kSource, HandoverPhase::kGivenUp);
  host_.ask = absl::UnavailableError("not up yet");
  Pass();
  host_.Forget();
  host_.on_ask = [&](const HandoverEntry&) { Append(entry, {HandoverPhase::kTakenBack}); };
  EXPECT_EQ(Decide(Decision::kRunsThere).code(), absl::StatusCode::kAborted);
  EXPECT_THAT(Phases(), ElementsAre(HandoverPhase::kTakenBack));
  EXPECT_THAT(host_.calls(), ElementsAre("ask"));
}

// Its pass was slow, for another guest's peer was mute; it ended a guest that had arrived since.
TEST_F(RecoveryTest, WhatWasReadBeforeIsReadAgainBeforeItIsActedUpon) {
  const HandoverEntry arriving = Write(HandoverRole::kTarget, HandoverPhase::kWaiting);
  Write(HandoverRole::kSource, HandoverPhase::kGivenUp, "other", "mute:7350");
  host_.ask = absl::DeadlineExceededError("mute");
  host_.on_ask = [&](const HandoverEntry&) {
    Append(arriving, {HandoverPhase::kToldToRun, HandoverPhase::kRunning});
  };
  Pass();
  EXPECT_THAT(host_.calls(), ElementsAre("ask"));
  EXPECT_THAT(Phases(),
              ::testing::UnorderedElementsAre(HandoverPhase::kRunning, HandoverPhase::kGivenUp));
}

// The claim is a session's while it begins: what it is about to use recovery must not end.
TEST_F(RecoveryTest, AGuestWhoseNameIsClaimedIsLeftAlone) {
  Write(HandoverRole::kTarget, HandoverPhase::kWaiting);
  const GuestClaims::Claim claim = claims_->Take("g1", absl::ZeroDuration());
  ASSERT_TRUE(claim.held());
  Pass();
  EXPECT_THAT(host_.calls(), IsEmpty());
  EXPECT_THAT(Phases(), ElementsAre(HandoverPhase::kWaiting));
}

TEST_F(RecoveryTest, EachMutePeerIsAskedOnceAndAllAtATime) {
  constexpr int kPeers = 8;
  for (int i = 0; i < 3 * kPeers; ++i) {
    Write(HandoverRole::kSource, HandoverPhase::kGivenUp, "g" + std::to_string(i),
          "mute" + std::to_string(i % kPeers) + ":7350");
  }
  Mutex mutex;
  int asked = 0;
  bool all_together = true;
  // Each question waits until all peers are being asked: one after the other they never would be.
  host_.ask = absl::DeadlineExceededError("mute");
  host_.on_ask = [&](const HandoverEntry&) {
    MutexLock lock(&mutex);
    ++asked;
    const auto all = [&] { return asked >= kPeers; };
    all_together = mutex.AwaitWithTimeout(all, absl::Seconds(60)) && all_together;
  };
  Pass();
  EXPECT_TRUE(all_together);
  EXPECT_EQ(asked, kPeers);
  EXPECT_EQ(recovery_.open().size(), 3u * kPeers);
}

TEST_F(RecoveryTest, BeforeAnybodyListensNobodyIsAsked) {
  Write(HandoverRole::kSource, HandoverPhase::kGivenUp);
  Write(HandoverRole::kTarget, HandoverPhase::kWaiting, "g2");
  recovery_.PassHere(NotInUse);
  EXPECT_THAT(host_.calls(), ElementsAre("end"));
  EXPECT_THAT(OpenText(), HasSubstr("is being asked"));
}

TEST_F(RecoveryTest, AGuestThatWasGivenUpIsHeldStillAndThatIsSaid) {
  Write(HandoverRole::kSource, HandoverPhase::kGivenUp);
  host_.ask = absl::UnavailableError("refused");
  Pass();
  host_.Forget();
  recovery_.HoldGivenUp(NotInUse);
  EXPECT_THAT(host_.calls(), IsEmpty());
  host_.hold = absl::AbortedError("somebody resumed it here: it was stopped again");
  recovery_.HoldGivenUp(NotInUse);
  EXPECT_THAT(host_.calls(), ElementsAre("hold"));
  EXPECT_THAT(OpenText(), HasSubstr("somebody resumed it here"));
  EXPECT_THAT(Log(), HasSubstr("somebody resumed it here"));
  recovery_.HoldGivenUp([](const std::string&) { return true; });
  EXPECT_THAT(host_.calls(), ElementsAre("hold")) << "a session has it, and holds it itself";
}

// What was given up before the guest came back is no reason to let it stand: it ran there.
TEST_F(RecoveryTest, AnOlderGivenUpDoesNotHoldUpAGuestThatCameBack) {
  Write(HandoverRole::kSource, HandoverPhase::kGivenUp);
  Write(HandoverRole::kTarget, HandoverPhase::kToldToRun);
  host_.ask = absl::UnavailableError("refused");
  Pass();
  EXPECT_THAT(host_.calls(), ElementsAre("ask", "quit", "run"));
  EXPECT_THAT(Phases(), ElementsAre(HandoverPhase::kRunning));
}

TEST_F(RecoveryTest, AGuestInASessionsHandsIsLeftAlone) {
  Write(HandoverRole::kSource, HandoverPhase::kPreparing);
  recovery_.Pass([](const std::string& guest) { return guest == "g1"; });
  EXPECT_THAT(host_.calls(), IsEmpty());
  EXPECT_THAT(OpenText(), IsEmpty());
  EXPECT_EQ(Phases().size(), 1u);
}

// A step of the wall clock over a week took answers away that were still needed.
TEST_F(RecoveryTest, SettledRecordsOfATargetGoAfterAWhileWhateverTheWallClockSays) {
  const HandoverEntry old = Write(HandoverRole::kTarget, HandoverPhase::kRunning);
  Write(HandoverRole::kTarget, HandoverPhase::kToldToRun);
  host_.run = absl::DeadlineExceededError("no answer");
  const timespec long_ago[2] = {{.tv_sec = 1'000'000'000}, {.tv_sec = 1'000'000'000}};
  ::utimensat(AT_FDCWD, HandoverRecord::Path(folder_, old).c_str(), long_ago, 0);
  now_.uptime_s += 6 * 24 * 3600;
  Pass();
  EXPECT_EQ(Phases().size(), 2u);
  now_.uptime_s += 2 * 24 * 3600;
  Pass();
  EXPECT_THAT(Phases(), ElementsAre(HandoverPhase::kToldToRun));
}

TEST_F(RecoveryTest, AfterARebootARecordIsAsOldAsTheHostIsUpAtLeast) {
  Write(HandoverRole::kTarget, HandoverPhase::kNeverRan);
  now_ = {.boot = "another", .uptime_s = 6 * 24 * 3600};
  Pass();
  EXPECT_THAT(Phases(), ElementsAre(HandoverPhase::kNeverRan));
  now_.uptime_s = 8 * 24 * 3600;
  Pass();
  EXPECT_THAT(Phases(), IsEmpty());
}

TEST_F(RecoveryTest, AGuestThatMovedMustNotBeStartedHereUntilItIsBack) {
  EXPECT_TRUE(CheckMayStart(folder_, "g1").ok());
  Write(HandoverRole::kSource, HandoverPhase::kGivenUp);
  EXPECT_TRUE(absl::IsFailedPrecondition(CheckMayStart(folder_, "g1")));
  host_.answer = wire::Outcome::RUNNING;
  Pass();
  EXPECT_THAT(Phases(), IsEmpty());
  const absl::Status may = CheckMayStart(folder_, "g1");
  EXPECT_TRUE(absl::IsFailedPrecondition(may));
  EXPECT_THAT(std::string(may.message()), HasSubstr("may-start g1 --clear"));
  EXPECT_TRUE(CheckMayStart(folder_, "g2").ok());
  Write(HandoverRole::kTarget, HandoverPhase::kToldToRun);
  Pass();
  EXPECT_TRUE(CheckMayStart(folder_, "g1").ok()) << "it is back";
}

TEST_F(RecoveryTest, ARecordThatCantBeReadIsNamed) {
  Write(HandoverRole::kSource, HandoverPhase::kGivenUp);
  for (const auto& file : std::filesystem::directory_iterator(folder_)) {
    std::filesystem::resize_file(file, 100);
  }
  Pass();
  EXPECT_THAT(OpenText(), HasSubstr("can't be read"));
  EXPECT_TRUE(recovery_.open()[0].for_a_person);
}

}  // namespace
}  // namespace presync
