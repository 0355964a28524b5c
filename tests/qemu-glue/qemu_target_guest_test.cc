// A stock QEMU as the target: what it refuses, what it must not do by itself.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <signal.h>

#include <thread>

#include "qemu-glue/qemu_guest.h"
#include "tests/qemu-glue/qemu_guest_fixture.h"

namespace presync {
namespace {

using ::testing::HasSubstr;

class QemuTargetGuestTest : public QemuGuestTest {};

std::string Label(const ::testing::TestParamInfo<QemuVersionUnderTest>& info) {
  return info.param.label;
}
INSTANTIATE_TEST_SUITE_P(Versions, QemuTargetGuestTest,
                         ::testing::ValuesIn(QemuVersionsUnderTest()), Label);

TEST_P(QemuTargetGuestTest, RefusesATargetThatWouldRunByItself) {
  auto qemu = StartTarget(/*stopped=*/false);
  absl::Status status = QemuTargetGuest::Create(qemu->TakeMonitor(), Soon()).status();
  EXPECT_TRUE(absl::IsFailedPrecondition(status)) << status;
  EXPECT_THAT(std::string(status.message()), HasSubstr("-incoming defer -S"));
}

TEST_P(QemuTargetGuestTest, RefusesATargetThatWaitsForNothing) {
  auto qemu = StartSource();
  absl::Status status = QemuTargetGuest::Create(qemu->TakeMonitor(), Soon()).status();
  EXPECT_TRUE(absl::IsFailedPrecondition(status)) << status;
}

// Found by the fault campaign: a QEMU that was killed with the order to run on its way left its
// source in doubt, although it had never read the order.
TEST_P(QemuTargetGuestTest, AQemuThatEndsBeforeItReadsTheOrderToRunRefusedIt) {
  auto source_qemu = StartSource();
  auto source = Source(*source_qemu);
  const std::string state = Save(*source);
  for (const bool ended_before : {true, false}) {
    auto qemu = StartTarget();
    auto target = Target(*qemu);
    ASSERT_TRUE(Load(*target, state).ok());
    std::thread killer;
    if (ended_before) {
      ASSERT_TRUE(qemu->process().Kill(Soon()).ok());
    } else {
      ASSERT_EQ(::kill(target->pid(), SIGSTOP), 0);  // it reads nothing any more
      killer = std::thread([&] {
        absl::SleepFor(kWhile);
        ::kill(target->pid(), SIGKILL);
      });
    }
    const absl::Status run = target->Run(Soon());
    if (killer.joinable()) killer.join();
    EXPECT_TRUE(absl::IsFailedPrecondition(run)) << run;
  }
}

// A stray `cont` while the target waits cancels -S; BeginLoad takes it back, and one that comes
// later is found.
TEST_P(QemuTargetGuestTest, NeverMissesAStrayCont) {
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

TEST_P(QemuTargetGuestTest, DiscardsATargetThatNeverRan) {
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

TEST_P(QemuTargetGuestTest, ReportsAStateThatDoesNotLoad) {
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
