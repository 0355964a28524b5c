// A stock QEMU as the source: saved, undone from every step, ended. One move from end to end, of
// two QEMUs that share no file: RAM is copied by the test, device state goes through the guests.
#include "qemu-glue/qemu_guest.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <sys/socket.h>
#include <sys/un.h>

#include <functional>

#include "tests/qemu-glue/qemu_guest_fixture.h"
#include "transport/clock.h"

namespace presync {
namespace {

std::string Label(const ::testing::TestParamInfo<QemuVersionUnderTest>& info) {
  return info.param.label;
}
INSTANTIATE_TEST_SUITE_P(Versions, QemuGuestTest, ::testing::ValuesIn(QemuVersionsUnderTest()),
                         Label);

TEST_P(QemuGuestTest, MovesAGuestThatCountsOn) {
  auto source_qemu = StartSource();
  auto target_qemu = StartTarget();
  auto source = Source(*source_qemu);
  auto target = Target(*target_qemu);
  EXPECT_EQ(source->State(Soon()).value(), RunState::kRunning);
  EXPECT_EQ(target->State(Soon()).value(), RunState::kIncoming);

  const std::string state = Save(*source);
  ASSERT_FALSE(state.empty());
  SavedRunState saved;
  for (const char byte : state) saved.Take({&byte, 1});
  EXPECT_EQ(saved.run_state(), "running");
  source->OnSaved(state);
  EXPECT_TRUE(source->CheckRan().ok());
  EXPECT_EQ(source->State(Soon()).value(), RunState::kPaused);
  const uint32_t last = source_qemu->RegisterCounter();
  EXPECT_FALSE(source_qemu->CounterMoves(kWhile));
  CopyFile(source_qemu->ram_path(), target_qemu->ram_path());

  absl::Status loaded = Load(*target, state);
  ASSERT_TRUE(loaded.ok()) << loaded;
  EXPECT_EQ(target->State(Soon()).value(), RunState::kPaused);
  EXPECT_FALSE(target_qemu->CounterMoves(kWhile));
  EXPECT_EQ(target_qemu->RegisterCounter(), last);
  absl::Status runs = target->Run(Soon());
  ASSERT_TRUE(runs.ok()) << runs;
  EXPECT_EQ(target->State(Soon()).value(), RunState::kRunning);
  // Both counters go on where they were: registers and RAM have arrived.
  ASSERT_TRUE(target_qemu->CounterMoves(kPatience));
  EXPECT_GT(target_qemu->RegisterCounter(), last);
  EXPECT_GT(target_qemu->MemoryCounter(), last);
  EXPECT_EQ(OnCapabilities(target->qmp()), "");

  absl::Status quit = source->Quit(Soon());
  EXPECT_TRUE(quit.ok()) << quit;
  EXPECT_EQ(source->State(Soon()).value(), RunState::kGone);
  EXPECT_TRUE(source->Quit(Soon()).ok());
  Report("source", source->steps());
  Report("target", target->steps());
  std::printf("[ MEASURED ] %s device state: %zu bytes\n", GetParam().label.c_str(), state.size());
}

// How far a save gets before it is undone.
struct SaveStep {
  const char* name;
  std::function<absl::Status(QemuSourceGuest&, UniqueFd*, std::future<std::string>*)> reach;
};

std::vector<SaveStep> SaveSteps() {
  auto begin = [](QemuSourceGuest& guest, UniqueFd* stream, std::future<std::string>*) {
    absl::StatusOr<UniqueFd> begun = guest.BeginSave(Soon());
    if (begun.ok()) *stream = *std::move(begun);
    return begun.status();
  };
  auto stop = [begin](QemuSourceGuest& guest, UniqueFd* stream, std::future<std::string>* state) {
    absl::Status status = begin(guest, stream, state);
    if (!status.ok()) return status;
    *state = ReadAll(std::move(*stream));
    return guest.Stop(Soon()).status();
  };
  auto finish = [stop](QemuSourceGuest& guest, UniqueFd* stream, std::future<std::string>* state) {
    absl::Status status = stop(guest, stream, state);
    return status.ok() ? guest.FinishSave(Soon()) : status;
  };
  return {
      {"nothing begun", [](auto&&...) { return absl::OkStatus(); }},
      {"begun, nobody reads", begin},
      {"begun, the reader is gone",
       [begin](QemuSourceGuest& guest, UniqueFd* stream, std::future<std::string>* state) {
         absl::Status status = begin(guest, stream, state);
         stream->reset();
         return status;
       }},
      {"stopped", stop},
      // QEMU is anywhere between pre-switchover and completed when the next command arrives.
      {"finishing",
       [stop](QemuSourceGuest& guest, UniqueFd* stream, std::future<std::string>* state) {
         absl::Status status = stop(guest, stream, state);
         if (!status.ok()) return status;
         return guest.qmp()
             .Execute("migrate-continue", {{"state", "pre-switchover"}}, Soon())
             .status();
       }},
      {"finished", finish},
  };
}

// Cuts this process's connection to the monitor at `path`; QEMU does not end by that.
void CutMonitor(const std::string& path) {
  for (int fd = 3; fd < 1024; ++fd) {
    sockaddr_un peer = {};
    socklen_t size = sizeof(peer);
    if (::getpeername(fd, reinterpret_cast<sockaddr*>(&peer), &size) != 0) continue;
    if (peer.sun_family == AF_UNIX && path == peer.sun_path) ::shutdown(fd, SHUT_RDWR);
  }
}

// Found by the fault campaign: the guest stood still for ever, for a monitor that closed was taken
// for a QEMU that had ended.
TEST_P(QemuGuestTest, ResumesThroughANewMonitorWhenItsOwnWasClosed) {
  for (const SaveStep& step : SaveSteps()) {
    SCOPED_TRACE(step.name);
    std::future<std::string> state;
    UniqueFd stream;
    auto qemu = StartSource();
    auto guest = Source(*qemu);
    ASSERT_TRUE(step.reach(*guest, &stream, &state).ok());
    CutMonitor(guest->qmp().path());
    const absl::Status resumed = guest->Resume(Soon());
    ASSERT_TRUE(resumed.ok()) << resumed;
    EXPECT_EQ(guest->State(Soon()).value(), RunState::kRunning);
    EXPECT_TRUE(qemu->CounterMoves(kPatience));
    CutMonitor(guest->qmp().path());
    EXPECT_EQ(guest->State(Soon()).value(), RunState::kRunning);
    qemu.reset();  // whose end ends the stream
  }
}

TEST_P(QemuGuestTest, ResumesFromEveryStepAndSavesAgain) {
  std::vector<std::future<std::string>> streams;  // outlive the QEMU, whose end ends them
  auto qemu = StartSource();
  auto guest = Source(*qemu);
  absl::StatusOr<Json> parameters =
      guest->qmp().Execute("query-migrate-parameters", nullptr, Soon());
  ASSERT_TRUE(parameters.ok());
  for (const SaveStep& step : SaveSteps()) {
    SCOPED_TRACE(step.name);
    UniqueFd stream;
    std::future<std::string>& state = streams.emplace_back();
    absl::Status reached = step.reach(*guest, &stream, &state);
    ASSERT_TRUE(reached.ok()) << reached;
    absl::Status resumed = guest->Resume(Soon());
    ASSERT_TRUE(resumed.ok()) << resumed;
    EXPECT_EQ(guest->State(Soon()).value(), RunState::kRunning);
    EXPECT_TRUE(qemu->CounterMoves(kPatience));
    EXPECT_EQ(OnCapabilities(guest->qmp()), "");
    EXPECT_EQ(guest->qmp().Execute("query-migrate-parameters", nullptr, Soon()).value(),
              *parameters);
    EXPECT_TRUE(guest->Resume(Soon()).ok());  // once more is no harm
    if (state.valid()) state.wait();
  }
  auto target_qemu = StartTarget();
  auto target = Target(*target_qemu);
  const std::string state = Save(*guest);
  CopyFile(qemu->ram_path(), target_qemu->ram_path());
  absl::Status loaded = Load(*target, state);
  ASSERT_TRUE(loaded.ok()) << loaded;
  ASSERT_TRUE(target->Run(Soon()).ok());
  EXPECT_TRUE(target_qemu->CounterMoves(kPatience));
  Report("source", guest->steps());
}

TEST_P(QemuGuestTest, LeavesAGuestPausedThatTheOperatorPaused) {
  for (const SaveStep& step : SaveSteps()) {
    SCOPED_TRACE(step.name);
    UniqueFd stream;
    std::future<std::string> state;  // outlives the QEMU, whose end ends the stream
    auto qemu = StartSource();
    auto guest = Source(*qemu);
    ASSERT_TRUE(guest->qmp().Execute("stop", nullptr, Soon()).ok());
    absl::Status reached = step.reach(*guest, &stream, &state);
    ASSERT_TRUE(reached.ok()) << reached;
    for (int times = 0; times < 2; ++times) {
      absl::Status resumed = guest->Resume(Soon());
      ASSERT_TRUE(resumed.ok()) << resumed;
      EXPECT_EQ(guest->State(Soon()).value(), RunState::kPaused);
    }
    EXPECT_FALSE(qemu->CounterMoves(kWhile));
    if (state.valid()) state.wait();
    EXPECT_TRUE(guest->qmp().Execute("cont", nullptr, Soon()).ok());
    EXPECT_TRUE(qemu->CounterMoves(kPatience));
  }
}

TEST_P(QemuGuestTest, AStopThatComesWhileItIsPreparedIsNotUndone) {
  for (const SaveStep& step : SaveSteps()) {
    SCOPED_TRACE(step.name);
    // It may have completed, and then only what it saved tells, which nobody looks at here.
    if (std::string_view(step.name) == "finishing") continue;
    UniqueFd stream;
    std::future<std::string> state;  // outlives the QEMU, whose end ends the stream
    auto qemu = StartSource();
    auto guest = Source(*qemu);
    ASSERT_TRUE(guest->PrepareSave(Soon()).ok());
    ASSERT_TRUE(guest->qmp().Execute("stop", nullptr, Soon()).ok());
    const absl::Status reached = step.reach(*guest, &stream, &state);
    ASSERT_TRUE(reached.ok()) << reached;
    if (std::string_view(step.name) == "finished") {
      guest->OnSaved(state.get());
      const absl::Status ran = guest->CheckRan();
      EXPECT_TRUE(absl::IsFailedPrecondition(ran)) << ran;
      EXPECT_THAT(std::string(ran.message()), ::testing::HasSubstr("paused"));
    }
    ASSERT_TRUE(guest->Resume(Soon()).ok());
    EXPECT_EQ(guest->State(Soon()).value(), RunState::kPaused);
    EXPECT_FALSE(qemu->CounterMoves(kWhile));
    if (state.valid()) state.wait();
    EXPECT_TRUE(guest->qmp().Execute("cont", nullptr, Soon()).ok());
    EXPECT_TRUE(qemu->CounterMoves(kPatience));
  }
}

TEST_P(QemuGuestTest, AnHeirUndoesWhatADeadPresyncdLeft) {
  for (const SaveStep& step : SaveSteps()) {
    SCOPED_TRACE(step.name);
    UniqueFd stream;
    std::future<std::string> state;  // outlives the QEMU, whose end ends the stream
    auto qemu = StartSource();
    auto guest = Source(*qemu);
    absl::StatusOr<Json> parameters =
        guest->qmp().Execute("query-migrate-parameters", nullptr, Soon());
    ASSERT_TRUE(parameters.ok());
    absl::Status reached = step.reach(*guest, &stream, &state);
    ASSERT_TRUE(reached.ok()) << reached;
    guest.reset();  // presyncd dies
    stream.reset();
    absl::StatusOr<std::unique_ptr<QmpClient>> again = QmpClient::Connect(qemu->qmp_path(), Soon());
    ASSERT_TRUE(again.ok()) << again.status();
    auto heir = QemuSourceGuest::Create(*std::move(again), Soon());
    ASSERT_TRUE(heir.ok()) << heir.status();
    absl::Status resumed = (*heir)->Resume(Soon());
    ASSERT_TRUE(resumed.ok()) << resumed;
    EXPECT_TRUE(qemu->CounterMoves(kPatience));
    EXPECT_THAT(OnCapabilities((*heir)->qmp()), ::testing::AnyOf("", "events "));
    EXPECT_EQ((*heir)->qmp().Execute("query-migrate-parameters", nullptr, Soon()).value(),
              *parameters);
    if (state.valid()) state.wait();
    // A guest that the operator paused is none of its business.
    ASSERT_TRUE((*heir)->qmp().Execute("stop", nullptr, Soon()).ok());
    ASSERT_TRUE((*heir)->Resume(Soon()).ok());
    EXPECT_EQ((*heir)->State(Soon()).value(), RunState::kPaused);
  }
}

TEST_P(QemuGuestTest, StopGivesUpWhenNobodyReads) {
  // Video RAM and the BIOS don't fit into the socket, so QEMU can't get past its live pass.
  auto qemu = StartSource({"-device", "VGA"});
  auto guest = Source(*qemu);
  absl::StatusOr<UniqueFd> stream = guest->BeginSave(Soon());
  ASSERT_TRUE(stream.ok()) << stream.status();
  absl::Status stopped = guest->Stop(MonotonicNow() + kWhile).status();
  EXPECT_TRUE(absl::IsDeadlineExceeded(stopped)) << stopped;
  EXPECT_TRUE(qemu->CounterMoves(kPatience));
  absl::Status resumed = guest->Resume(Soon());
  ASSERT_TRUE(resumed.ok()) << resumed;
  EXPECT_TRUE(qemu->CounterMoves(kPatience));
}

TEST_P(QemuGuestTest, SaysSoWhenStepsAreOutOfOrder) {
  auto qemu = StartSource();
  auto guest = Source(*qemu);
  EXPECT_TRUE(absl::IsFailedPrecondition(guest->Stop(Soon()).status()));
  EXPECT_TRUE(absl::IsFailedPrecondition(guest->FinishSave(Soon())));
  absl::StatusOr<UniqueFd> stream = guest->BeginSave(Soon());
  ASSERT_TRUE(stream.ok());
  absl::Status twice = guest->BeginSave(Soon()).status();
  EXPECT_TRUE(absl::IsFailedPrecondition(twice)) << twice;
  EXPECT_TRUE(guest->Resume(Soon()).ok());
  EXPECT_TRUE(qemu->CounterMoves(kPatience));
}

TEST_P(QemuGuestTest, PutsTheOperatorsSettingsBack) {
  auto qemu = StartSource();
  auto guest = Source(*qemu);
  const Json capabilities = {{"capabilities",
                              {{{"capability", "auto-converge"}, {"state", true}},
                               {{"capability", "x-ignore-shared"}, {"state", true}}}}};
  ASSERT_TRUE(guest->qmp().Execute("migrate-set-capabilities", capabilities, Soon()).ok());
  ASSERT_TRUE(
      guest->qmp().Execute("migrate-set-parameters", {{"downtime-limit", 77}}, Soon()).ok());
  ASSERT_FALSE(Save(*guest).empty());
  ASSERT_TRUE(guest->Resume(Soon()).ok());
  EXPECT_EQ(OnCapabilities(guest->qmp()), "auto-converge ");
  absl::StatusOr<Json> parameters =
      guest->qmp().Execute("query-migrate-parameters", nullptr, Soon());
  ASSERT_TRUE(parameters.ok());
  EXPECT_EQ(UintAt(*parameters, "downtime-limit"), 77u);
}

TEST_P(QemuGuestTest, ReportsAQemuThatDiesInMidSave) {
  for (int step : {1, 3}) {
    UniqueFd stream;
    std::future<std::string> state;
    auto qemu = StartSource();
    auto guest = Source(*qemu);
    ASSERT_TRUE(SaveSteps()[step].reach(*guest, &stream, &state).ok());
    ASSERT_EQ(::kill(guest->pid(), SIGKILL), 0);
    absl::Status failed = step == 1 ? guest->Stop(Soon()).status() : guest->FinishSave(Soon());
    EXPECT_TRUE(absl::IsUnavailable(failed)) << failed;
    EXPECT_TRUE(absl::IsUnavailable(guest->Resume(Soon())));
    EXPECT_EQ(guest->State(Soon()).value(), RunState::kGone);
    EXPECT_TRUE(guest->Quit(Soon()).ok());
  }
}

TEST_P(QemuGuestTest, KillsAQemuThatDoesNotQuit) {
  auto qemu = StartSource();
  auto guest = Source(*qemu);
  ASSERT_EQ(::kill(guest->pid(), SIGSTOP), 0);
  absl::Status quit = guest->Quit(MonotonicNow() + absl::Seconds(2));
  EXPECT_TRUE(quit.ok()) << quit;
  EXPECT_EQ(guest->State(Soon()).value(), RunState::kGone);
}

}  // namespace
}  // namespace presync
