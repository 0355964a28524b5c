// When recovery takes a QEMU for gone.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstring>
#include <filesystem>
#include <memory>
#include <string>
#include <vector>

#include "absl/time/clock.h"
#include "qemu-glue/process_identity.h"
#include "qemu-glue/qemu_target_host.h"
#include "qemu-glue/qmp/listener.h"
#include "tests/qemu-glue/fake_qmp_server.h"
#include "tools/presyncd/recovery.h"

namespace presync {
namespace {

// A process that takes every connection and closes it at once, until it is killed.
class ClosingMonitor {
 public:
  ClosingMonitor() {
    char name[] = "/tmp/presync-recovery-host-XXXXXX";
    folder_ = ::mkdtemp(name);
    child_ = ::fork();
    if (child_ == 0) Serve();
    while (!ListenerLives(path())) absl::SleepFor(absl::Milliseconds(1));
  }
  ~ClosingMonitor() {
    if (child_ > 0) End();
    std::filesystem::remove_all(folder_);
  }
  // It stays a zombie until it is reaped.
  void Kill() {
    ::kill(child_, SIGKILL);
    siginfo_t info;
    ::waitid(P_PID, static_cast<id_t>(child_), &info, WEXITED | WNOWAIT);
  }
  void End() {
    ::kill(child_, SIGKILL);
    ::waitpid(child_, nullptr, 0);
    child_ = -1;
  }
  std::string path() const { return folder_ + "/qmp"; }

 private:
  void Serve() const {
    sockaddr_un address = {};
    address.sun_family = AF_UNIX;
    std::strcpy(address.sun_path, path().c_str());  // NOLINT: it fits
    const int listener = ::socket(AF_UNIX, SOCK_STREAM, 0);
    if (::bind(listener, reinterpret_cast<sockaddr*>(&address), sizeof(address)) != 0) ::_exit(1);
    if (::listen(listener, 8) != 0) ::_exit(1);
    while (true) ::close(::accept(listener, nullptr, nullptr));
  }

  std::string folder_;
  pid_t child_ = -1;
};

// Taken for gone its record was removed, and a guest that a handover had stopped stood for ever.
TEST(QemuRecoveryHostTest, AMonitorThatClosesIsNoQemuThatHasEnded) {
  ClosingMonitor monitor;
  QemuRecoveryHost host(nullptr, {});
  HandoverEntry entry;
  entry.detail = monitor.path();
  EXPECT_TRUE(absl::IsAborted(host.ResumeSource(entry))) << host.ResumeSource(entry);
  EXPECT_TRUE(absl::IsAborted(host.QuitSource(entry)));
  monitor.Kill();
  EXPECT_TRUE(host.ResumeSource(entry).ok()) << "a zombie has ended";
  monitor.End();
  EXPECT_TRUE(host.ResumeSource(entry).ok());
  EXPECT_TRUE(host.QuitSource(entry).ok());
  entry.detail += "-that-never-was";
  EXPECT_TRUE(host.ResumeSource(entry).ok());
}

// This process passes for a QEMU; what it is told is noted.
class QemuOfTheRecordTest : public ::testing::Test {
 protected:
  QemuOfTheRecordTest() {
    entry_.detail = server_->path();
    entry_.process = FormatProcess(IdentifyProcess(::getpid()));
    entry_.phase = HandoverPhase::kTakenBack;
  }
  Json Answer(const std::string& command) {
    if (command == "query-cpus-fast") return Json::array({{{"thread-id", ::getpid()}}});
    if (command == "query-status") return {{"status", run_state_}};
    if (command == "query-migrate") return {{"status", migration_}};
    if (command == "query-migrate-parameters") return Json::object();
    if (command == "query-migrate-capabilities") {
      return Json::array({{{"capability", "x-ignore-shared"}, {"state", marked_}}});
    }
    told_.push_back(command);
    if (command == "cont") run_state_ = "running";
    if (command == "stop") run_state_ = "paused";
    if (command == "migrate_cancel") migration_ = "cancelled";
    return Json::object();
  }

  std::string run_state_ = "postmigrate";
  std::string migration_ = "completed";
  bool marked_ = false;
  std::vector<std::string> told_;
  std::unique_ptr<FakeQmpServer> server_ = std::make_unique<FakeQmpServer>(
      AnswerEach([this](const std::string& command, const Json&) { return Answer(command); }));
  QemuRecoveryHost host_{nullptr, {}};
  HandoverEntry entry_;
};

// The operator moved it by QEMU's own migration while no presyncd was there: it ran here, too.
TEST_F(QemuOfTheRecordTest, OneThatSomebodyElseMovedIsNotResumed) {
  const absl::Status resumed = host_.ResumeSource(entry_);
  EXPECT_TRUE(resumed.ok()) << resumed;
  EXPECT_THAT(told_, ::testing::IsEmpty());
}

TEST_F(QemuOfTheRecordTest, SomebodyElsesMigrationIsNotCancelled) {
  run_state_ = "running";
  migration_ = "active";
  EXPECT_TRUE(host_.ResumeSource(entry_).ok());
  EXPECT_THAT(told_, ::testing::IsEmpty());
}

TEST_F(QemuOfTheRecordTest, OneThatBearsPresyncsMarkGoesOn) {
  marked_ = true;
  const absl::Status resumed = host_.ResumeSource(entry_);
  EXPECT_TRUE(resumed.ok()) << resumed;
  EXPECT_THAT(told_, ::testing::Contains("cont"));
}

// Once somebody resumed it it was held still: paused is then where a handover left it.
TEST_F(QemuOfTheRecordTest, OneThatWasHeldStillGoesOnWhenItWasTakenBack) {
  marked_ = true;
  run_state_ = "paused";
  EXPECT_TRUE(host_.ResumeSource(entry_).ok());
  EXPECT_THAT(told_, ::testing::Contains("cont"));
}

TEST_F(QemuOfTheRecordTest, OneThatItsOperatorPausedDoesNot) {
  marked_ = true;
  run_state_ = "paused";
  entry_.phase = HandoverPhase::kPreparing;
  EXPECT_TRUE(host_.ResumeSource(entry_).ok());
  EXPECT_THAT(told_, ::testing::Not(::testing::Contains("cont")));
}

TEST_F(QemuOfTheRecordTest, OneThatWasGivenUpAndResumedIsStoppedAgain) {
  run_state_ = "running";
  const absl::Status still = host_.HoldSource(entry_);
  EXPECT_TRUE(absl::IsAborted(still)) << still;
  EXPECT_THAT(told_, ::testing::ElementsAre("stop"));
}

// Another process that was given the number, or the address, is somebody else's.
TEST_F(QemuOfTheRecordTest, AnotherProcessIsLeftAlone) {
  ProcessIdentity gone = IdentifyProcess(::getpid());
  ++gone.start_ticks;
  entry_.process = FormatProcess(gone);
  EXPECT_TRUE(host_.ResumeSource(entry_).ok());
  EXPECT_TRUE(host_.QuitSource(entry_).ok());
  EXPECT_TRUE(host_.HoldSource(entry_).ok());
  EXPECT_FALSE(host_.OrphanLives(entry_));
  entry_.process = FormatProcess(IdentifyProcess(::getppid()));
  EXPECT_TRUE(absl::IsAborted(host_.ResumeSource(entry_))) << "its own lives, and is not reached";
  EXPECT_THAT(told_, ::testing::IsEmpty());
}

// Guests with `attach` leave no note of their process: without one they counted as ended.
TEST_F(QemuOfTheRecordTest, AWaitingGuestWithoutANoteHasNotEnded) {
  const std::string folder = std::filesystem::path(server_->path()).parent_path();
  auto host = QemuTargetHost::Create({.ram_folder = folder, .run_folder = folder});
  ASSERT_TRUE(host.ok()) << host.status();
  run_state_ = "running";
  EXPECT_TRUE(absl::IsAlreadyExists((*host)->EndOrphan(entry_)));
  server_.reset();
  server_ = std::make_unique<FakeQmpServer>(
      AnswerEach([this](const std::string& command, const Json&) { return Answer(command); }), 2);
  entry_.detail = server_->path();
  EXPECT_TRUE((*host)->RunOrphan(entry_).ok());
  entry_.process.clear();  // an older presyncd's record
  EXPECT_TRUE(absl::IsFailedPrecondition((*host)->EndOrphan(entry_)));
}

}  // namespace
}  // namespace presync
