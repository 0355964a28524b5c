// Two stock QEMUs that share no file: RAM is copied by the test, device state goes through the
// guests.
#include "qemu-glue/qemu_guest.h"

#include <fcntl.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <sys/socket.h>
#include <unistd.h>

#include <array>
#include <cstdio>
#include <functional>
#include <future>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "tests/qemu-glue/test_qemu.h"

namespace presync {
namespace {

using ::testing::HasSubstr;

// Only a hang reaches this.
absl::Time Soon() { return absl::Now() + absl::Seconds(60); }
// For what must not happen: how long a test waits to see that it doesn't.
constexpr absl::Duration kWhile = absl::Milliseconds(100);
constexpr absl::Duration kPatience = absl::Seconds(60);

// Reads the stream to its end, in a thread, as the relay of presyncd does.
std::future<std::string> ReadAll(UniqueFd stream) {
  return std::async(std::launch::async, [stream = std::move(stream)] {
    std::string bytes;
    std::array<char, 65536> chunk;
    for (ssize_t n = 0; (n = ::read(stream.get(), chunk.data(), chunk.size())) > 0;) {
      bytes.append(chunk.data(), static_cast<size_t>(n));
    }
    return bytes;
  });
}

void CopyFile(const std::string& from, const std::string& to) {
  UniqueFd source(::open(from.c_str(), O_RDONLY | O_CLOEXEC));
  UniqueFd target(::open(to.c_str(), O_WRONLY | O_CLOEXEC));
  std::vector<char> chunk(1 << 20);
  for (uint64_t done = 0; done < kTestRamBytes; done += chunk.size()) {
    const auto offset = static_cast<off_t>(done);
    ASSERT_EQ(::pread(source.get(), chunk.data(), chunk.size(), offset), ssize_t(chunk.size()));
    ASSERT_EQ(::pwrite(target.get(), chunk.data(), chunk.size(), offset), ssize_t(chunk.size()));
  }
}

bool WriteAll(const UniqueFd& stream, std::string_view bytes) {
  while (!bytes.empty()) {
    const ssize_t n = ::send(stream.get(), bytes.data(), bytes.size(), MSG_NOSIGNAL);
    if (n <= 0) return false;
    bytes.remove_prefix(static_cast<size_t>(n));
  }
  return true;
}

class QemuGuestTest : public ::testing::TestWithParam<QemuVersionUnderTest> {
 protected:
  void SetUp() override {
    if (GetParam().binary.empty()) GTEST_SKIP() << GetParam().skip_reason;
  }

  std::unique_ptr<TestQemu> StartSource(std::vector<std::string> more = {}) {
    TestQemuOptions options;
    options.more = std::move(more);
    auto qemu = std::make_unique<TestQemu>(folder_, GetParam(), absl::StrCat("source", ++started_),
                                           options);
    EXPECT_TRUE(qemu->CounterMoves(kPatience));
    return qemu;
  }

  std::unique_ptr<TestQemu> StartTarget(bool stopped = true, std::vector<std::string> more = {}) {
    TestQemuOptions options;
    options.target = true;
    options.stopped = stopped;
    options.more = std::move(more);
    return std::make_unique<TestQemu>(folder_, GetParam(), absl::StrCat("target", ++started_),
                                      options);
  }

  static std::unique_ptr<QemuSourceGuest> Source(TestQemu& qemu) {
    absl::StatusOr<std::unique_ptr<QemuSourceGuest>> guest =
        QemuSourceGuest::Create(qemu.TakeMonitor(), Soon());
    EXPECT_TRUE(guest.ok()) << guest.status();
    return *std::move(guest);
  }

  static std::unique_ptr<QemuTargetGuest> Target(TestQemu& qemu) {
    absl::StatusOr<std::unique_ptr<QemuTargetGuest>> guest =
        QemuTargetGuest::Create(qemu.TakeMonitor(), Soon());
    EXPECT_TRUE(guest.ok()) << guest.status();
    return *std::move(guest);
  }

  // Saves `source` to the end and returns its device state.
  static std::string Save(QemuSourceGuest& source) {
    absl::StatusOr<UniqueFd> stream = source.BeginSave(Soon());
    EXPECT_TRUE(stream.ok()) << stream.status();
    if (!stream.ok()) return "";
    std::future<std::string> state = ReadAll(*std::move(stream));
    absl::Status stopped = source.Stop(Soon());
    EXPECT_TRUE(stopped.ok()) << stopped;
    absl::Status finished = source.FinishSave(Soon());
    EXPECT_TRUE(finished.ok()) << finished;
    if (!finished.ok()) ::kill(source.pid(), SIGKILL);  // or the stream would never end
    return state.get();
  }

  static absl::Status Load(QemuTargetGuest& target, std::string_view state) {
    absl::StatusOr<UniqueFd> stream = target.BeginLoad(Soon());
    if (!stream.ok()) return stream.status();
    if (!WriteAll(*stream, state)) return absl::UnavailableError("the target took no more");
    stream->reset();
    return target.AwaitLoaded(Soon());
  }

  static void Report(const char* side, const std::vector<GuestStep>& steps) {
    for (const GuestStep& step : steps) {
      std::printf("[ MEASURED ] %s %s %s: %.1f ms\n", GetParam().label.c_str(), side,
                  std::string(step.name).c_str(), absl::ToDoubleMilliseconds(step.took));
    }
  }

  static std::string OnCapabilities(QmpClient& qmp) {
    absl::StatusOr<Json> all = qmp.Execute("query-migrate-capabilities", nullptr, Soon());
    EXPECT_TRUE(all.ok()) << all.status();
    std::string on;
    for (const Json& one : *all) {
      if (BoolAt(one, "state").value_or(true))
        absl::StrAppend(&on, StringAt(one, "capability"), " ");
    }
    return on;
  }

  TestFolder folder_;
  int started_ = 0;
};

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
    return guest.Stop(Soon());
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
  absl::Status stopped = guest->Stop(absl::Now() + kWhile);
  EXPECT_TRUE(absl::IsDeadlineExceeded(stopped)) << stopped;
  EXPECT_TRUE(qemu->CounterMoves(kPatience));
  absl::Status resumed = guest->Resume(Soon());
  ASSERT_TRUE(resumed.ok()) << resumed;
  EXPECT_TRUE(qemu->CounterMoves(kPatience));
}

TEST_P(QemuGuestTest, SaysSoWhenStepsAreOutOfOrder) {
  auto qemu = StartSource();
  auto guest = Source(*qemu);
  EXPECT_TRUE(absl::IsFailedPrecondition(guest->Stop(Soon())));
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
    absl::Status failed = step == 1 ? guest->Stop(Soon()) : guest->FinishSave(Soon());
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
  absl::Status quit = guest->Quit(absl::Now() + absl::Seconds(2));
  EXPECT_TRUE(quit.ok()) << quit;
  EXPECT_EQ(guest->State(Soon()).value(), RunState::kGone);
}

TEST_P(QemuGuestTest, RefusesATargetThatWouldRunByItself) {
  auto qemu = StartTarget(/*stopped=*/false);
  absl::Status status = QemuTargetGuest::Create(qemu->TakeMonitor(), Soon()).status();
  EXPECT_TRUE(absl::IsFailedPrecondition(status)) << status;
  EXPECT_THAT(std::string(status.message()), HasSubstr("-incoming defer -S"));
}

TEST_P(QemuGuestTest, RefusesATargetThatWaitsForNothing) {
  auto qemu = StartSource();
  absl::Status status = QemuTargetGuest::Create(qemu->TakeMonitor(), Soon()).status();
  EXPECT_TRUE(absl::IsFailedPrecondition(status)) << status;
}

// A stray `cont` while the target waits cancels -S; BeginLoad takes it back, and one that comes
// later is found.
TEST_P(QemuGuestTest, NeverMissesAStrayCont) {
  auto source_qemu = StartSource();
  auto source = Source(*source_qemu);
  const std::string state = Save(*source);
  for (bool before : {true, false}) {
    auto qemu = StartTarget();
    auto target = Target(*qemu);
    if (before) {
      ASSERT_TRUE(target->qmp().Execute("cont", nullptr, Soon()).ok());
    }
    absl::StatusOr<UniqueFd> stream = target->BeginLoad(Soon());
    ASSERT_TRUE(stream.ok()) << stream.status();
    if (!before) {
      ASSERT_TRUE(target->qmp().Execute("cont", nullptr, Soon()).ok());
    }
    ASSERT_TRUE(WriteAll(*stream, state));
    stream->reset();
    absl::Status loaded = target->AwaitLoaded(Soon());
    if (before) {
      EXPECT_TRUE(loaded.ok()) << loaded;
    } else {
      EXPECT_TRUE(absl::IsInternal(loaded)) << loaded;
    }
    EXPECT_EQ(target->State(Soon()).value(), before ? RunState::kPaused : RunState::kRunning);
  }
}

TEST_P(QemuGuestTest, DiscardsATargetThatNeverRan) {
  auto qemu = StartTarget();
  auto target = Target(*qemu);
  absl::StatusOr<UniqueFd> stream = target->BeginLoad(Soon());
  ASSERT_TRUE(stream.ok()) << stream.status();
  EXPECT_TRUE(absl::IsFailedPrecondition(target->BeginLoad(Soon()).status()));
  EXPECT_EQ(target->State(Soon()).value(), RunState::kIncoming);
  absl::Status discarded = target->Discard(Soon());
  EXPECT_TRUE(discarded.ok()) << discarded;
  EXPECT_EQ(target->State(Soon()).value(), RunState::kGone);
}

TEST_P(QemuGuestTest, ReportsAStateThatDoesNotLoad) {
  auto source_qemu = StartSource();
  auto source = Source(*source_qemu);
  const std::string state = Save(*source);
  const std::vector<std::string> broken = {std::string("no migration stream"),
                                           state.substr(0, state.size() / 2)};
  for (const std::string& bytes : broken) {
    auto qemu = StartTarget();
    auto target = Target(*qemu);
    absl::Status loaded = Load(*target, bytes);
    EXPECT_TRUE(absl::IsUnavailable(loaded) || absl::IsFailedPrecondition(loaded)) << loaded;
    EXPECT_NE(target->State(Soon()).value_or(RunState::kGone), RunState::kRunning);
    EXPECT_TRUE(target->Discard(Soon()).ok());
  }
}

}  // namespace
}  // namespace presync
