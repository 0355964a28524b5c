// A presyncd that finds notes of syncs when it starts, with whatever answers, or does not, where
// their guests' monitors were. How a sync really goes on is tests/e2e_resume.py's.
#include "tools/presyncd/daemon.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <poll.h>
#include <signal.h>
#include <spdlog/sinks/ostream_sink.h>
#include <spdlog/spdlog.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstring>
#include <filesystem>
#include <fstream>
#include <sstream>

#include "tests/qemu-glue/fake_qmp_server.h"
#include "tools/common/local_api.h"
#include "transport/sync/departures.h"

namespace presync {
namespace {

using ::testing::HasSubstr;
using ::testing::IsEmpty;

class DaemonTest : public ::testing::Test {
 protected:
  DaemonTest() {
    char name[] = "/tmp/presync-daemon-XXXXXX";
    folder_ = ::mkdtemp(name);
    std::filesystem::create_directory(folder_ + "/state");
    spdlog::set_default_logger(std::make_shared<spdlog::logger>(
        "test", std::make_shared<spdlog::sinks::ostream_sink_mt>(log_)));
  }
  ~DaemonTest() override {
    listener_.reset();  // what hangs ends
    daemon_.reset();
    std::filesystem::remove_all(folder_);
  }

  void Start() {
    Config config;
    config.listen_port = 0;
    config.state_folder = folder_ + "/state";
    config.run_folder = folder_ + "/run";
    config.ram_folder = folder_ + "/ram";
    absl::StatusOr<std::unique_ptr<Daemon>> daemon = Daemon::Create(config);
    ASSERT_TRUE(daemon.ok()) << daemon.status();
    daemon_ = *std::move(daemon);
  }
  // As SIGTERM does.
  void Stop() { daemon_.reset(); }

  // A sync of a guest that an earlier presyncd had; this process passes for its QEMU.
  SyncNote Note(const std::string& guest, const std::string& qmp) const {
    return {.guest = guest,
            .order = {{"name", guest}, {"qmp", qmp}, {"to", "127.0.0.1:9"}},
            .qemu = IdentifyProcess(::getpid())};
  }
  void Leave(const SyncNote& note) { ASSERT_TRUE(SyncNotes(folder_ + "/state").Write(note).ok()); }
  bool Noted(const std::string& guest) const {
    return std::filesystem::exists(SyncNotes(folder_ + "/state").PathOf(guest));
  }

  // A monitor that takes connections and never says a word.
  std::string Hanging() {
    const std::string path = folder_ + "/hanging.qmp";
    listener_ = UniqueFd(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0));
    sockaddr_un address = {};
    address.sun_family = AF_UNIX;
    std::memcpy(address.sun_path, path.data(), path.size());
    EXPECT_EQ(::bind(listener_.get(), reinterpret_cast<sockaddr*>(&address), sizeof(address)), 0);
    EXPECT_EQ(::listen(listener_.get(), 8), 0);
    return path;
  }
  bool WasConnected() {
    pollfd p = {.fd = listener_.get(), .events = POLLIN, .revents = 0};
    return ::poll(&p, 1, 0) > 0;
  }

  nlohmann::json Ask(const std::string& command, const std::string& name) {
    return daemon_->Handle({{"command", command}, {"name", name}});
  }
  // Its entry in the status; an empty object if there is none.
  nlohmann::json Guest(const std::string& name) {
    const nlohmann::json all = Ask("status", name)["guests"];
    return all.empty() ? nlohmann::json::object() : all[0];
  }
  bool AwaitProblem(const std::string& name, const std::string& words) {
    for (int i = 0; i < 20'000; ++i) {
      if (TextOr(Guest(name), "problem", "").find(words) != std::string::npos) return true;
      absl::SleepFor(absl::Milliseconds(1));
    }
    return false;
  }

  std::string folder_;
  std::ostringstream log_;
  UniqueFd listener_;
  std::unique_ptr<Daemon> daemon_;
};

// It would end the other's waiting QEMUs, and remove their memory.
TEST_F(DaemonTest, ASecondOneIsRefusedInEachFolderOfTheFirst) {
  Start();
  for (const char* shared : {"state", "run", "ram"}) {
    Config config;
    config.listen_port = 0;
    config.state_folder = folder_ + (shared == std::string_view("state") ? "/state" : "/state2");
    config.run_folder = folder_ + (shared == std::string_view("run") ? "/run" : "/run2");
    config.ram_folder = folder_ + (shared == std::string_view("ram") ? "/ram" : "/ram2");
    const absl::Status second = Daemon::Create(config).status();
    EXPECT_TRUE(absl::IsAlreadyExists(second)) << second;
    EXPECT_THAT(std::string(second.message()), HasSubstr(std::string(shared) + "_folder"));
  }
  Stop();
  Start();
}

TEST_F(DaemonTest, OneFolderMayServeForAll) {
  Config config;
  config.listen_port = 0;
  config.state_folder = config.run_folder = config.ram_folder = folder_ + "/all";
  EXPECT_TRUE(Daemon::Create(config).ok());
}

TEST_F(DaemonTest, AGuestWhoseQemuHasEndedIsReportedAndItsNoteGoes) {
  SyncNote note = Note("g1", "/nowhere.qmp");
  ++note.qemu.start_ticks;  // another process has the number by now
  Leave(note);
  Start();
  ASSERT_TRUE(AwaitProblem("g1", "has ended"));
  EXPECT_EQ(Guest("g1")["state"], "failed");
  EXPECT_EQ(Guest("g1")["to"], "127.0.0.1:9");
  EXPECT_FALSE(Noted("g1"));
  const nlohmann::json stopped = Ask("stop", "g1");
  EXPECT_TRUE(FlagOr(stopped, "ok", false)) << "seen";
  EXPECT_EQ(stopped["state"], "failed") << "not that the guest goes on here";
  EXPECT_EQ(stopped["problem"], "its QEMU (process " + std::to_string(::getpid()) + ") has ended");
  EXPECT_THAT(Guest("g1"), IsEmpty());
  Stop();
  EXPECT_THAT(log_.str(), HasSubstr("g1: its sync ended: its QEMU"));
}

TEST_F(DaemonTest, AMonitorThatHangsHoldsNobodyUp) {
  Leave(Note("hangs", Hanging()));
  SyncNote gone = Note("gone", "/nowhere.qmp");
  gone.qemu.boot = "an earlier one";
  Leave(gone);
  Start();
  ASSERT_TRUE(AwaitProblem("gone", "has ended"));
  EXPECT_EQ(Guest("hangs")["state"], "connecting");
  EXPECT_THAT(TextOr(Ask("launch", "hangs"), "error", ""), HasSubstr("not kept in sync"));
  EXPECT_THAT(TextOr(Ask("verify", "hangs"), "error", ""), HasSubstr("yet again"));
  EXPECT_TRUE(Noted("hangs"));
}

TEST_F(DaemonTest, WhatCannotBeReadIsNamedAndStopsNothing) {
  const std::string path = folder_ + "/state/g1.sync";
  std::ofstream(path) << "{\"version\": 1, \"gue";
  Start();
  EXPECT_THAT(Guest("g1"), IsEmpty());
  Stop();
  EXPECT_THAT(log_.str(), HasSubstr(path));
  EXPECT_TRUE(std::filesystem::exists(path));
}

TEST_F(DaemonTest, ItsEndLeavesTheNotesForTheNextOne) {
  Leave(Note("g1", "/nowhere.qmp"));
  for (int life = 0; life < 3; ++life) {
    Start();
    ASSERT_TRUE(AwaitProblem("g1", "/nowhere.qmp")) << "the QEMU lives, its monitor may come back";
    EXPECT_EQ(Guest("g1")["state"], "connecting");
    Stop();
    EXPECT_TRUE(Noted("g1"));
  }
}

TEST_F(DaemonTest, StopForgetsOneThatDoesNotGoOnYet) {
  Leave(Note("g1", "/nowhere.qmp"));
  Start();
  ASSERT_TRUE(AwaitProblem("g1", "/nowhere.qmp"));
  EXPECT_TRUE(FlagOr(Ask("stop", "g1"), "ok", false));
  EXPECT_FALSE(Noted("g1"));
  EXPECT_THAT(Guest("g1"), IsEmpty());
  EXPECT_EQ(TextOr(Ask("stop", "g1"), "code", ""), "NOT_FOUND");
}

TEST_F(DaemonTest, NoSyncBeginsWhileAHandoverIsOpen) {
  const std::string qmp = Hanging();
  Leave(Note("g1", qmp));
  HandoverEntry given_up;
  given_up.guest = "g1";
  given_up.session = SessionId{1};
  given_up.phase = HandoverPhase::kGivenUp;
  given_up.peer = "127.0.0.1:9";
  given_up.detail = qmp;
  ASSERT_TRUE(HandoverRecord::Open(folder_ + "/state", given_up).ok());
  Start();
  ASSERT_TRUE(AwaitProblem("g1", "handover has to be settled first"));
  EXPECT_EQ(Guest("g1")["state"], "connecting");
  nlohmann::json typed = Note("g1", qmp).order;
  typed["command"] = "start";
  EXPECT_THAT(TextOr(daemon_->Handle(typed), "error", ""), HasSubstr("settled first"));
  EXPECT_TRUE(AwaitProblem("g1", "handover has to be settled first"));
  EXPECT_FALSE(WasConnected()) << "the guest is not even looked at";
  EXPECT_TRUE(Noted("g1"));
}

TEST_F(DaemonTest, ARecordThatCantBeReadIsOpenToo) {
  const std::string qmp = Hanging();
  Leave(Note("g1", qmp));
  std::ofstream(folder_ + "/state/g1.0011.source") << std::string(4096, '?');
  Start();
  ASSERT_TRUE(AwaitProblem("g1", "can't be read"));
  EXPECT_FALSE(WasConnected());
}

// What a QEMU of this process, and its guest, say of themselves.
Json Describe(const std::string& run_state, const std::string& command) {
  if (command == "query-name" || command == "query-uuid") return Json::object();
  if (command == "query-kvm") return {{"enabled", false}, {"present", false}};
  if (command == "query-status") return {{"status", run_state}, {"running", false}};
  if (command == "query-memory-size-summary") return {{"base-memory", 4096}};
  if (command == "query-memdev" || command == "qom-list") return Json::array();
  if (command == "query-cpus-fast") return Json::array({{{"thread-id", ::getpid()}}});
  return nullptr;
}

TEST_F(DaemonTest, AnotherQemuWhereTheGuestsWasIsLeftAlone) {
  const pid_t child = ::fork();
  if (child == 0) {
    ::pause();
    ::_exit(0);
  }
  auto server = std::make_unique<FakeQmpServer>(AnswerEach(
      [](const std::string& command, const Json&) { return Describe("running", command); }));
  SyncNote note = Note("g1", server->path());
  note.qemu = IdentifyProcess(child);
  Leave(note);
  Start();
  EXPECT_TRUE(AwaitProblem("g1", "another QEMU"));
  EXPECT_EQ(Guest("g1")["state"], "failed");
  EXPECT_FALSE(Noted("g1"));
  server.reset();
  ::kill(child, SIGKILL);
  ::waitpid(child, nullptr, 0);
}

TEST_F(DaemonTest, AGuestThatStandsAsAHandoverLeavesItIsNotSynced) {
  auto server = std::make_unique<FakeQmpServer>(AnswerEach(
      [](const std::string& command, const Json&) { return Describe("postmigrate", command); }));
  Leave(Note("g1", server->path()));
  Start();
  EXPECT_TRUE(AwaitProblem("g1", "postmigrate"));
  EXPECT_EQ(Guest("g1")["state"], "connecting");
  EXPECT_TRUE(Noted("g1"));
  server.reset();
}

// Restart=always around the source's QEMU: every move that succeeded left two, and nothing was
// open.
TEST_F(DaemonTest, AQemuThatComesUpWhereAGuestLeftIsHeldStill) {
  std::string run_state = "running";
  auto server = std::make_unique<FakeQmpServer>(
      AnswerEach([&](const std::string& command, const Json&) -> Json {
        if (command != "stop") return Describe(run_state, command);
        run_state = "paused";
        return Json::object();
      }),
      2);  // a look whether anybody listens, and a talk
  const HandoverEntry left = {.guest = "g1",
                              .session = RandomId(),
                              .peer = "b:7350",
                              .detail = server->path(),
                              .process = "1 1 an earlier boot"};
  ASSERT_TRUE(NoteDeparture(folder_ + "/state", left).ok());
  Start();
  std::string open;
  for (int i = 0; i < 20'000 && open.find("held still") == std::string::npos; ++i) {
    open = Ask("status", "g1")["open"].dump();
    absl::SleepFor(absl::Milliseconds(1));
  }
  EXPECT_THAT(open, HasSubstr("held still"));
  EXPECT_THAT(open, HasSubstr("presync may-start g1 --clear"));
  EXPECT_EQ(run_state, "paused");
  const nlohmann::json started = daemon_->Handle(
      {{"command", "start"}, {"name", "g1"}, {"qmp", "/nowhere.qmp"}, {"to", "127.0.0.1:9"}});
  EXPECT_THAT(TextOr(started, "error", ""), HasSubstr("must not be started here"));
  Stop();
  server.reset();
}

TEST_F(DaemonTest, AStartThatFailsLeavesNoNote) {
  Start();
  EXPECT_EQ(TextOr(daemon_->Handle({{"command", "start"},
                                    {"name", "g1"},
                                    {"qmp", "/nowhere.qmp"},
                                    {"to", "127.0.0.1:9"}}),
                   "code", ""),
            "NOT_FOUND");
  EXPECT_FALSE(Noted("g1"));
  EXPECT_THAT(Guest("g1"), IsEmpty());
}

}  // namespace
}  // namespace presync
