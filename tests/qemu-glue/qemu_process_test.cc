#include "qemu-glue/qemu_process.h"

#include <fcntl.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>

#include "absl/strings/str_cat.h"
#include "tests/qemu-glue/fake_qmp_server.h"
#include "tests/qemu-glue/test_qemu.h"
#include "transport/clock.h"

namespace presync {
namespace {

using ::testing::EndsWith;
using ::testing::HasSubstr;
using ::testing::Not;

absl::Time Soon() { return MonotonicNow() + absl::Seconds(60); }

QemuProcess::Options Program(const TestFolder& folder, std::vector<std::string> argv) {
  return {std::move(argv), folder.Path("qmp"), folder.Path("log"), {}};
}

TEST(QemuProcess, QuotesAProgramThatEndsAtOnce) {
  TestFolder folder;
  absl::Status status =
      QemuProcess::Start(
          Program(folder, {"sh", "-c", "echo first; echo no such machine >&2; exit 1"}), Soon())
          .status();
  EXPECT_TRUE(absl::IsFailedPrecondition(status)) << status;
  EXPECT_THAT(std::string(status.message()), HasSubstr("first; no such machine"));
}

TEST(QemuProcess, KillsAProgramThatNeverAnswers) {
  TestFolder folder;
  absl::Status status =
      QemuProcess::Start(Program(folder, {"sh", "-c", "echo my pid is $$; exec sleep 1000"}),
                         MonotonicNow() + absl::Seconds(2))
          .status();
  EXPECT_TRUE(absl::IsDeadlineExceeded(status)) << status;
  const std::string text(status.message());
  const size_t said = text.find("my pid is ");
  ASSERT_NE(said, std::string::npos) << text;
  EXPECT_EQ(::kill(std::stoi(text.substr(said + 10)), 0), -1);
}

TEST(QemuProcess, SaysWhatIsMissing) {
  TestFolder folder;
  EXPECT_TRUE(absl::IsInvalidArgument(QemuProcess::Start(Program(folder, {}), Soon()).status()));
  absl::Status status = QemuProcess::Start(Program(folder, {"/no/such/qemu"}), Soon()).status();
  EXPECT_TRUE(absl::IsNotFound(status)) << status;
  QemuProcess::Options no_log = Program(folder, {"true"});
  no_log.log_path = "/no/such/folder/log";
  EXPECT_TRUE(absl::IsNotFound(QemuProcess::Start(no_log, Soon()).status()));
}

// Whoever writes the log may be taken over: its last words are what it wrote, not what it points
// at.
TEST(QemuProcess, QuotesNoOtherFileThanItsLog) {
  TestFolder folder;
  std::ofstream(folder.Path("secret")) << "the host's key";
  const std::string log = folder.Path("log");
  const std::string script =
      absl::StrCat("echo mine; rm ", log, "; ln -s ", folder.Path("secret"), " ", log, "; exit 1");
  absl::Status status = QemuProcess::Start(Program(folder, {"sh", "-c", script}), Soon()).status();
  EXPECT_THAT(std::string(status.message()), HasSubstr("mine"));
  EXPECT_THAT(std::string(status.message()), Not(HasSubstr("the host's key")));
  status = QemuProcess::Start(Program(folder, {"true"}), Soon()).status();
  EXPECT_TRUE(absl::IsFailedPrecondition(status)) << status;
  EXPECT_THAT(std::string(status.message()), HasSubstr("no plain file"));
}

TEST(QemuProcess, ALogThatGrowsIsCutAndGoesOn) {
  TestFolder folder;
  const std::string path = folder.Path("log");
  absl::StatusOr<QemuLog> log = QemuLog::Open(path);
  ASSERT_TRUE(log.ok()) << log.status();
  const std::string line(1000, 'x');
  for (int64_t written = 0; written <= kLongestQemuLogBytes; written += 1000) {
    ASSERT_EQ(::write(log->fd(), line.data(), line.size()), 1000);
  }
  ASSERT_EQ(::write(log->fd(), "the end", 7), 7);
  CutLongQemuLog(path);
  EXPECT_LT(std::filesystem::file_size(path), size_t{kKeptQemuLogBytes} + 200);
  EXPECT_THAT(log->WordsSinceOpened(), EndsWith("the end"));
  ASSERT_EQ(::write(log->fd(), ", and more", 10), 10);
  EXPECT_THAT(log->WordsSinceOpened(), EndsWith("the end, and more"));
  CutLongQemuLog(path);
  CutLongQemuLog(folder.Path("none"));
  EXPECT_THAT(log->WordsSinceOpened(), EndsWith("the end, and more"));
}

TEST(QemuProcess, RejectsASocketThatIsSomeoneElses) {
  TestFolder folder;
  FakeQmpServer other([](FakeQmpConnection& qemu) {
    qemu.Greet();
    qemu.AwaitHangUp();
  });
  QemuProcess::Options options = Program(folder, {"sleep", "1000"});
  options.qmp_path = other.path();
  absl::Status status = QemuProcess::Start(options, Soon()).status();
  EXPECT_TRUE(absl::IsFailedPrecondition(status)) << status;
  EXPECT_THAT(std::string(status.message()), HasSubstr("a socket of its own"));
}

TEST(QemuProcess, WhatMakesAProcessOfItsOwnIsNotLeftBehind) {
  const QemuVersionUnderTest system = QemuVersionsUnderTest()[0];
  if (system.binary.empty()) GTEST_SKIP() << system.skip_reason;
  TestFolder folder;
  const std::string path = folder.Path("qmp");
  const std::vector<std::string> command = {
      system.binary, "-nodefaults", "-display", "none",
      "-machine",    "none",        "-qmp",     absl::StrCat("unix:", path, ",server=on,wait=off"),
      "-daemonize"};
  const absl::Status status = QemuProcess::Start(Program(folder, command), Soon()).status();
  EXPECT_TRUE(absl::IsFailedPrecondition(status)) << status;
  const absl::Time deadline = Soon();
  bool answers = true;
  while (answers && MonotonicNow() < deadline) {
    answers = QmpClient::Connect(path, MonotonicNow() + absl::Seconds(1)).ok();
  }
  EXPECT_FALSE(answers);
}

TEST(QemuProcess, StartsARealOneApartFromUs) {
  const QemuVersionUnderTest system = QemuVersionsUnderTest()[0];
  if (system.binary.empty()) GTEST_SKIP() << system.skip_reason;
  TestFolder folder;
  UniqueFd leak(::open("/dev/null", O_RDONLY));  // not close-on-exec: must not reach QEMU
  ASSERT_GE(::fcntl(leak.get(), F_DUPFD, 500), 500);
  TestQemu qemu(folder, system, "own", {});
  const pid_t pid = qemu.process().pid();
  EXPECT_EQ(::getsid(pid), pid);
  EXPECT_GT(qemu.process().start_ticks(), 0u);
  EXPECT_EQ(std::filesystem::read_symlink(absl::StrCat("/proc/", pid, "/cwd")), "/");
  EXPECT_FALSE(std::filesystem::exists(
      std::filesystem::symlink_status(absl::StrCat("/proc/", pid, "/fd/500"))));
  EXPECT_FALSE(qemu.process().HasEnded());
  EXPECT_NE(qemu.TakeMonitor(), nullptr);
  absl::Status killed = qemu.process().Kill(Soon());
  EXPECT_TRUE(killed.ok()) << killed;
  EXPECT_TRUE(qemu.process().HasEnded());
  EXPECT_EQ(::kill(pid, 0), -1);  // reaped
  ::close(500);
}

}  // namespace
}  // namespace presync
