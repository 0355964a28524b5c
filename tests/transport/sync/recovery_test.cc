// What becomes of handover records, rule by rule, with a host that does what the test says.
#include "transport/sync/recovery.h"

#include <fcntl.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <stdlib.h>
#include <sys/stat.h>

#include <filesystem>
#include <string>
#include <vector>

namespace presync {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;

class ScriptedHost final : public RecoveryHost {
 public:
  absl::Status ResumeSource(const HandoverEntry&) override { return Did("resume", resume); }
  absl::Status QuitSource(const HandoverEntry&) override { return Did("quit", quit); }
  absl::StatusOr<wire::Outcome> AskTarget(const HandoverEntry&) override {
    if (absl::Status s = Did("ask", ask); !s.ok()) return s;
    wire::Outcome outcome;
    outcome.set_value(answer);
    outcome.set_text("as scripted");
    return outcome;
  }
  absl::Status EndOrphan(const std::string&) override { return Did("end", end); }
  absl::Status RunOrphan(const std::string&) override { return Did("run", run); }

  absl::Status resume, quit, ask, end, run;
  wire::Outcome::Value answer = wire::Outcome::UNKNOWN;
  std::vector<std::string> calls;

 private:
  absl::Status Did(const char* call, const absl::Status& status) {
    calls.push_back(call);
    return status;
  }
};

class RecoveryTest : public ::testing::Test {
 protected:
  static std::string MakeFolder() {
    char name[] = "/tmp/presync-recovery-test-XXXXXX";
    return ::mkdtemp(name);
  }
  ~RecoveryTest() override { std::filesystem::remove_all(folder_); }

  HandoverEntry Write(HandoverRole role, HandoverPhase phase, const std::string& guest = "g1") {
    const HandoverEntry entry = {.role = role,
                                 .phase = phase,
                                 .guest = guest,
                                 .session = RandomId(),
                                 .peer = "b:7350",
                                 .detail = "/run/g1.qmp"};
    EXPECT_TRUE(HandoverRecord::Open(folder_, entry).ok());
    return entry;
  }
  void Pass() {
    recovery_.Pass([](const std::string&) { return false; });
  }
  absl::Status Decide(Decision decision) {
    return recovery_.Decide("g1", decision, [](const std::string&) { return false; });
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

  const std::string folder_ = MakeFolder();
  ScriptedHost host_;
  std::vector<std::string> log_;
  Recovery recovery_{
      {.folder = folder_, .log = [this](bool, const std::string& line) { log_.push_back(line); }},
      &host_};
};

TEST_F(RecoveryTest, AGuestThatWasNotGivenUpGoesOnHere) {
  Write(HandoverRole::kSource, HandoverPhase::kPreparing);
  Pass();
  EXPECT_THAT(host_.calls, ElementsAre("resume"));
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
  EXPECT_EQ(log_.size(), 1u) << "said once";
  host_.resume = absl::OkStatus();
  Pass();
  EXPECT_THAT(OpenText(), IsEmpty());
  EXPECT_THAT(Phases(), IsEmpty());
}

TEST_F(RecoveryTest, GivenUpResumesOnlyOnTheWordThatItNeverRan) {
  Write(HandoverRole::kSource, HandoverPhase::kGivenUp);
  host_.ask = absl::UnavailableError("refused");
  Pass();
  host_.ask = absl::OkStatus();
  host_.answer = wire::Outcome::UNKNOWN;
  Pass();
  EXPECT_THAT(host_.calls, ElementsAre("ask", "ask"));
  EXPECT_THAT(OpenText(), HasSubstr("presync settle g1 here"));
  EXPECT_THAT(OpenText(), HasSubstr("presync settle g1 there"));
  EXPECT_TRUE(recovery_.open()[0].for_a_person);
  host_.answer = wire::Outcome::NEVER_RAN;
  Pass();
  EXPECT_THAT(host_.calls, ElementsAre("ask", "ask", "ask", "resume"));
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
  EXPECT_THAT(host_.calls, ElementsAre("ask", "quit", "quit"));
  EXPECT_THAT(Phases(), IsEmpty());
}

// The QEMU at that address stands where the later handover left it: two would run.
TEST_F(RecoveryTest, AnOlderRecordDoesNotResumeAGuestThatALaterHandoverGaveUp) {
  Write(HandoverRole::kSource, HandoverPhase::kPreparing);
  Write(HandoverRole::kSource, HandoverPhase::kGivenUp);
  Write(HandoverRole::kTarget, HandoverPhase::kToldToRun);
  Write(HandoverRole::kSource, HandoverPhase::kPreparing, "another");
  host_.ask = absl::UnavailableError("refused");
  Pass();
  EXPECT_THAT(host_.calls, ::testing::UnorderedElementsAre("ask", "resume"));
  EXPECT_EQ(recovery_.open().size(), 3u);
}

TEST_F(RecoveryTest, AWaitingGuestNeverRuns) {
  Write(HandoverRole::kTarget, HandoverPhase::kWaiting);
  Pass();
  EXPECT_THAT(host_.calls, ElementsAre("end"));
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

TEST_F(RecoveryTest, AGuestThatWasToldToRunAndEndedIsAPersonsMatter) {
  Write(HandoverRole::kTarget, HandoverPhase::kToldToRun);
  host_.run = absl::NotFoundError("its QEMU has ended");
  Pass();
  EXPECT_TRUE(recovery_.open()[0].for_a_person);
  EXPECT_THAT(OpenText(), HasSubstr("presync settle g1 forget"));
  EXPECT_EQ(Decide(Decision::kRunsHere).code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_TRUE(Decide(Decision::kForget).ok());
  EXPECT_THAT(OpenText(), IsEmpty());
  EXPECT_THAT(Phases(), ElementsAre(HandoverPhase::kRunning)) << "its source is told so for ever";
}

TEST_F(RecoveryTest, APersonDecidesWhereAGuestRuns) {
  for (const bool here : {true, false}) {
    Write(HandoverRole::kSource, HandoverPhase::kGivenUp);
    host_.ask = absl::UnavailableError("that host burnt down");
    Pass();
    EXPECT_EQ(Decide(Decision::kForget).code(), absl::StatusCode::kFailedPrecondition);
    host_.calls.clear();
    EXPECT_TRUE(Decide(here ? Decision::kRunsHere : Decision::kRunsThere).ok());
    EXPECT_THAT(host_.calls, ElementsAre(here ? "resume" : "quit"));
    EXPECT_THAT(Phases(), IsEmpty());
  }
  EXPECT_EQ(Decide(Decision::kRunsHere).code(), absl::StatusCode::kNotFound);
}

TEST_F(RecoveryTest, AGuestInASessionsHandsIsLeftAlone) {
  Write(HandoverRole::kSource, HandoverPhase::kPreparing);
  recovery_.Pass([](const std::string& guest) { return guest == "g1"; });
  EXPECT_THAT(host_.calls, IsEmpty());
  EXPECT_THAT(OpenText(), IsEmpty());
  EXPECT_EQ(Phases().size(), 1u);
}

TEST_F(RecoveryTest, SettledRecordsOfATargetGoAfterAWhile) {
  const HandoverEntry old = Write(HandoverRole::kTarget, HandoverPhase::kRunning);
  Write(HandoverRole::kTarget, HandoverPhase::kNeverRan);
  const HandoverEntry open = Write(HandoverRole::kTarget, HandoverPhase::kToldToRun);
  host_.run = absl::DeadlineExceededError("no answer");
  const timespec long_ago[2] = {{.tv_sec = 1'000'000'000}, {.tv_sec = 1'000'000'000}};
  for (const HandoverEntry& entry : {old, open}) {
    ::utimensat(AT_FDCWD, HandoverRecord::Path(folder_, entry).c_str(), long_ago, 0);
  }
  Pass();
  EXPECT_THAT(Phases(),
              ::testing::UnorderedElementsAre(HandoverPhase::kNeverRan, HandoverPhase::kToldToRun));
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
