// Copies that outlive the presyncd that made them: which are taken up, and what becomes of the
// files of those that are not. The QEMUs themselves are not started here.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "absl/time/clock.h"
#include "qemu-glue/copy_note.h"
#include "qemu-glue/guest_notes.h"
#include "qemu-glue/process_identity.h"
#include "qemu-glue/qemu_target_host.h"
#include "transport/clock.h"

namespace presync {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;

const std::vector<RegionRequest> kRegions = {{"ram0", 16 * kPageBytes}, {"ram1", 4 * kPageBytes}};
const CopyOwner kOwner = {
    .guest = "g1", .session = {1, 2, 3}, .peer = "10.0.0.1:4711", .peer_name = "host1"};

class TargetCopyTest : public ::testing::Test {
 protected:
  TargetCopyTest() {
    char name[] = "/dev/shm/presync-copy-test-XXXXXX";
    folder_ = ::mkdtemp(name);
    options_ = {.ram_folder = folder_ + "/ram", .run_folder = folder_ + "/run"};
    options_.guests["g1"] = {.command = {"qemu", "{ram.ram0}", "{ram.ram1}", "{qmp}"},
                             .attach_qmp = ""};
    options_.log = [this](bool, const std::string& line) { log_ += line + "\n"; };
  }
  ~TargetCopyTest() override { std::filesystem::remove_all(folder_); }

  // What `life` does with a place happens in a process that is then gone, as by SIGKILL: nothing is
  // destroyed.
  template <typename Life>
  void InAnEarlierPresyncd(Life life) {
    const pid_t child = ::fork();
    if (child == 0) {
      auto host = QemuTargetHost::Create(options_);
      if (!host.ok()) ::_exit(2);
      auto place = (*host)->MakePlace("g1", kRegions);
      if (!place.ok()) ::_exit(3);
      std::memset((*place)->memory().Bytes({0, 16}).data(), 7, 16 * kPageBytes);
      life(**place);
      ::_exit(0);
    }
    int status = -1;
    ASSERT_EQ(::waitpid(child, &status, 0), child);
    ASSERT_EQ(status, 0);
  }

  std::vector<KeptPlace> TakeKept(bool may_be_used = true) {
    auto host = QemuTargetHost::Create(options_);
    EXPECT_TRUE(host.ok()) << host.status();
    host_ = *std::move(host);
    host_->EndWaitingLeftovers();
    return host_->TakeKept([&](const CopyOwner&) { return may_be_used; });
  }

  std::vector<std::string> FilesIn(const std::string& folder) {
    std::vector<std::string> names;
    for (const auto& file : std::filesystem::directory_iterator(folder_ + "/" + folder)) {
      names.push_back(file.path().filename());
    }
    std::sort(names.begin(), names.end());
    return names;
  }

  std::string folder_, log_;
  QemuTargetHostOptions options_;
  std::unique_ptr<QemuTargetHost> host_;
};

void Note(TargetPlace& place) {
  if (!place.NoteCopy(kOwner).ok()) ::_exit(4);
}

TEST_F(TargetCopyTest, ACopyIsTakenUpWithItsBytes) {
  InAnEarlierPresyncd(Note);
  std::vector<KeptPlace> kept = TakeKept();
  ASSERT_EQ(kept.size(), 1u) << log_;
  EXPECT_EQ(kept[0].owner.guest, "g1");
  EXPECT_EQ(kept[0].owner.session, kOwner.session);
  EXPECT_EQ(kept[0].owner.peer, kOwner.peer);
  EXPECT_EQ(kept[0].owner.peer_name, "host1");
  const GuestMemory& memory = kept[0].place->memory();
  ASSERT_EQ(memory.pages(), 20u);
  EXPECT_EQ(memory.Bytes({15, 1})[99], std::byte{7});
  EXPECT_EQ(memory.Bytes({16, 1})[99], std::byte{0});
  EXPECT_FALSE(kept[0].place->memory_was_zero());
  host_->RemoveLeftovers();
  EXPECT_THAT(FilesIn("ram"), ElementsAre("g1.ram0.ram", "g1.ram1.ram"));
  kept.clear();
  EXPECT_THAT(FilesIn("ram"), IsEmpty()) << "given up, its memory is free";
  EXPECT_THAT(FilesIn("run"), IsEmpty());
}

TEST_F(TargetCopyTest, ItOutlivesItsQemuToo) {
  InAnEarlierPresyncd([&](TargetPlace& place) {
    Note(place);
    // As it is written for a QEMU that runs: one that is gone by now.
    std::ofstream(folder_ + "/run/g1.guest")
        << R"({"pid": 2147483000, "start_ticks": 1, "qmp": "/q", "files": [")" << folder_
        << R"(/ram/g1.ram0.ram"]})";
  });
  EXPECT_EQ(TakeKept().size(), 1u) << log_;
  EXPECT_FALSE(std::filesystem::exists(folder_ + "/run/g1.guest"));
}

// A QEMU takes some 100 ms until its monitor answers: nobody would ever have ended it.
TEST_F(TargetCopyTest, AQemuThatWasJustStartedIsKnownToTheNextPresyncd) {
  options_.guests["g1"].command = {"sh", "-c", "exec sleep 1000", "{qmp}"};
  InAnEarlierPresyncd([this](TargetPlace& place) {
    std::thread starting([&] { (void)place.Waiting(absl::InfiniteFuture()); });
    while (ReadGuestNotes(folder_ + "/run").empty()) absl::SleepFor(absl::Milliseconds(1));
    ::_exit(0);
  });
  const std::vector<GuestNote> notes = ReadGuestNotes(folder_ + "/run");
  ASSERT_THAT(notes, ::testing::SizeIs(1));
  EXPECT_TRUE(IsAlive(notes[0]));
  EXPECT_THAT(notes[0].qmp, HasSubstr("g1.d/qmp"));
  EXPECT_EQ(::kill(notes[0].pid, SIGKILL), 0);
}

TEST_F(TargetCopyTest, AQemuThatDidNotStartLeavesNoNote) {
  options_.guests["g1"].command = {"sh", "-c", "exit 1", "{qmp}"};
  auto host = QemuTargetHost::Create(options_);
  ASSERT_TRUE(host.ok()) << host.status();
  auto place = (*host)->MakePlace("g1", kRegions);
  ASSERT_TRUE(place.ok()) << place.status();
  EXPECT_FALSE((*place)->Waiting(MonotonicNow() + absl::Seconds(20)).ok());
  (*host)->RemoveLeftovers();
  EXPECT_THAT(FilesIn("ram"), ElementsAre("g1.ram0.ram", "g1.ram1.ram"));
}

TEST_F(TargetCopyTest, LeftInOrderItIsFoundToo) {
  InAnEarlierPresyncd([](TargetPlace& place) {
    Note(place);
    place.Leave();
  });
  EXPECT_EQ(TakeKept().size(), 1u) << log_;
}

TEST_F(TargetCopyTest, AForgottenCopyIsNotTakenUp) {
  InAnEarlierPresyncd([](TargetPlace& place) {
    Note(place);
    if (!place.ForgetCopy().ok()) ::_exit(5);
  });
  EXPECT_THAT(TakeKept(), IsEmpty());
}

TEST_F(TargetCopyTest, AnotherFileOfTheSameNameIsNotTakenUpAndStays) {
  InAnEarlierPresyncd(Note);
  const std::string file = folder_ + "/ram/g1.ram1.ram";
  std::filesystem::copy_file(file, file + ".2");  // the first one's inode stays in use
  std::filesystem::rename(file + ".2", file);
  EXPECT_THAT(TakeKept(), IsEmpty());
  EXPECT_THAT(log_, HasSubstr("not the ones"));
  EXPECT_TRUE(std::filesystem::exists(file));
  EXPECT_THAT(FilesIn("run"), IsEmpty());
}

TEST_F(TargetCopyTest, WhereRecoverySaysNoItsMemoryIsFreed) {
  InAnEarlierPresyncd(Note);
  EXPECT_THAT(TakeKept(/*may_be_used=*/false), IsEmpty());
  EXPECT_THAT(FilesIn("ram"), IsEmpty());
}

TEST_F(TargetCopyTest, AGuestThatIsNotConfiguredAnyMoreIsGivenUp) {
  InAnEarlierPresyncd(Note);
  options_.guests.clear();
  EXPECT_THAT(TakeKept(), IsEmpty());
  EXPECT_THAT(log_, HasSubstr("not configured"));
  EXPECT_THAT(FilesIn("ram"), IsEmpty());
}

TEST_F(TargetCopyTest, NotesThatAreNoneArePassedOver) {
  std::filesystem::create_directories(folder_ + "/run");
  for (const char* text :
       {"", "{", "[]", R"({"guest": "g1"})",
        R"({"guest": "../g1", "session": "01", "holder_pid": 1, "files": []})"}) {
    std::ofstream(folder_ + "/run/g1.copy") << text;
    EXPECT_THAT(TakeKept(), IsEmpty());
  }
}

TEST_F(TargetCopyTest, ANoteUnderAnotherGuestsNameIsNotBelieved) {
  InAnEarlierPresyncd(Note);
  std::filesystem::rename(folder_ + "/run/g1.copy", folder_ + "/run/g2.copy");
  EXPECT_THAT(TakeKept(), IsEmpty());
  EXPECT_THAT(log_, HasSubstr("another guest's"));
}

// What lies in presyncd's folders may have been put there by a QEMU that ran as presyncd's user.
class UntrustedFilesTest : public TargetCopyTest {
 protected:
  UntrustedFilesTest() {
    std::filesystem::create_directories(folder_ + "/run");
    std::ofstream(precious_) << "precious";
  }

  std::string Precious() const {
    std::ifstream in(precious_);
    return {std::istreambuf_iterator<char>(in), {}};
  }

  // As presyncds wrote it before QEMUs ran apart.
  void WriteEarlierNote(pid_t pid, uint64_t start_ticks, const std::string& file) const {
    std::ofstream(folder_ + "/run/g1.guest")
        << R"({"files": [")" << folder_ << "/run/g1.qmp\", \"" << file << R"("], "pid": )" << pid
        << R"(, "qmp": ")" << folder_ << R"(/run/g1.qmp", "start_ticks": )" << start_ticks << "}\n";
  }

  const std::string precious_ = folder_ + "/precious";
  const std::string ram_ = folder_ + "/ram/g1.ram0.ram";
};

TEST_F(UntrustedFilesTest, ANoteRemovesNothingThatTheConfigurationDoesNotName) {
  WriteEarlierNote(2147483000, 1, precious_);
  TakeKept();
  EXPECT_EQ(Precious(), "precious");
  EXPECT_THAT(FilesIn("run"), IsEmpty());
  std::ofstream(folder_ + "/run/g1.guest")
      << R"({"pid": 2147483000, "start_ticks": 1, "regions": ["x/../../../precious"]})";
  TakeKept();
  EXPECT_EQ(Precious(), "precious");
}

TEST_F(UntrustedFilesTest, TheMemoryOfAnEarlierPresyncdsGuestGoesWhenItHasEnded) {
  std::filesystem::create_directories(folder_ + "/ram");
  std::ofstream(ram_) << "memory";
  std::ofstream(folder_ + "/run/g1.qmp") << "the socket";
  WriteEarlierNote(2147483000, 1, ram_);
  TakeKept();
  EXPECT_THAT(FilesIn("ram"), IsEmpty());
  EXPECT_THAT(FilesIn("run"), IsEmpty());
}

TEST_F(UntrustedFilesTest, AnEarlierPresyncdsGuestThatRunsIsKnownAndLeftAlone) {
  std::filesystem::create_directories(folder_ + "/ram");
  std::ofstream(ram_) << "memory";
  WriteEarlierNote(::getpid(), StartTicks(::getpid()), ram_);
  TakeKept();
  EXPECT_THAT(FilesIn("ram"), ElementsAre("g1.ram0.ram"));
  const std::vector<GuestNote> notes = ReadGuestNotes(folder_ + "/run");
  ASSERT_EQ(notes.size(), 1u);
  EXPECT_EQ(notes[0].pid, ::getpid());
  EXPECT_EQ(notes[0].qmp, folder_ + "/run/g1.qmp");
  const auto place = host_->MakePlace("g1", kRegions);
  EXPECT_TRUE(absl::IsAlreadyExists(place.status())) << place.status();
}

TEST_F(UntrustedFilesTest, AnEarlierNoteOfAGuestThatIsNotConfiguredSaysWhatIsLeft) {
  options_.guests.clear();
  WriteEarlierNote(2147483000, 1, precious_);
  TakeKept();
  EXPECT_EQ(Precious(), "precious");
  EXPECT_THAT(log_, HasSubstr("g1.*.ram"));
}

TEST_F(UntrustedFilesTest, ANotesSocketIsTheGuestsOwn) {
  std::ofstream(folder_ + "/run/g1.guest")
      << R"({"pid": 1, "start_ticks": 1, "qmp": "/run/libvirt/somebody.monitor"})";
  const std::vector<GuestNote> notes = ReadGuestNotes(folder_ + "/run");
  ASSERT_EQ(notes.size(), 1u);
  EXPECT_EQ(notes[0].qmp, folder_ + "/run/g1.qmp");
}

TEST_F(UntrustedFilesTest, ALinkInTheWayOfANoteIsReplaced) {
  std::filesystem::create_symlink(precious_, folder_ + "/run/g1.guest.new");
  EXPECT_TRUE(WriteGuestNote(folder_ + "/run", {.guest = "g1", .pid = 1}).ok());
  EXPECT_EQ(Precious(), "precious");
  EXPECT_TRUE(
      std::filesystem::is_regular_file(std::filesystem::symlink_status(folder_ + "/run/g1.guest")));
  std::filesystem::create_symlink(precious_, folder_ + "/run/g1.copy.new");
  EXPECT_TRUE(WriteCopyNote(folder_ + "/run/g1.copy", kOwner, {}).ok());
  EXPECT_EQ(Precious(), "precious");
}

// Whoever opens the other end of a FIFO waits for it.
TEST_F(UntrustedFilesTest, WhatIsNoPlainFileIsNotRead) {
  ASSERT_EQ(::mkfifo((folder_ + "/run/g1.guest").c_str(), 0600), 0);
  ASSERT_EQ(::mkfifo((folder_ + "/run/g1.copy").c_str(), 0600), 0);
  std::ofstream(folder_ + "/other") << R"({"pid": 1, "start_ticks": 1})";
  std::filesystem::create_symlink(folder_ + "/other", folder_ + "/run/g2.guest");
  EXPECT_THAT(ReadGuestNotes(folder_ + "/run"), IsEmpty());
  EXPECT_THAT(ReadCopyNotes(folder_ + "/run"), IsEmpty());
}

TEST_F(UntrustedFilesTest, AFolderWhereOthersMayWriteIsRefused) {
  for (const std::string& folder : {folder_ + "/ram", folder_ + "/run"}) {
    std::filesystem::create_directories(folder);
    ASSERT_EQ(::chmod(folder.c_str(), 0777), 0);
    const absl::Status status = QemuTargetHost::Create(options_).status();
    EXPECT_TRUE(absl::IsFailedPrecondition(status)) << status;
    EXPECT_THAT(std::string(status.message()), HasSubstr(folder + " is user"));
    EXPECT_THAT(std::string(status.message()), HasSubstr("chmod go-w " + folder));
    ASSERT_EQ(::chmod(folder.c_str(), 0750), 0);
    EXPECT_TRUE(QemuTargetHost::Create(options_).ok());
  }
  // As /dev/shm itself: everybody may make a file there, nobody may replace another one's.
  ASSERT_EQ(::chmod((folder_ + "/ram").c_str(), 01777), 0);
  EXPECT_TRUE(QemuTargetHost::Create(options_).ok());
  ASSERT_EQ(::chmod((folder_ + "/run").c_str(), 01777), 0);
  EXPECT_FALSE(QemuTargetHost::Create(options_).ok());
  if (::geteuid() != 0) GTEST_SKIP() << "giving a folder away needs root";
  ASSERT_EQ(::chmod((folder_ + "/run").c_str(), 0700), 0);
  EXPECT_TRUE(QemuTargetHost::Create(options_).ok());
  ASSERT_EQ(::chown((folder_ + "/run").c_str(), 1234, 1234), 0);
  const absl::Status status = QemuTargetHost::Create(options_).status();
  EXPECT_THAT(std::string(status.message()), HasSubstr("run_folder")) << status;
  EXPECT_THAT(std::string(status.message()), HasSubstr("user 1234"));
}

TEST_F(TargetCopyTest, WhileItsPresyncdLivesItIsNotTakenUp) {
  InAnEarlierPresyncd(Note);
  const std::vector<CopyNote> notes = ReadCopyNotes(folder_ + "/run");
  ASSERT_EQ(notes.size(), 1u);
  // From now on it is this process that holds it.
  ASSERT_TRUE(WriteCopyNote(notes[0].path, notes[0].owner, notes[0].files).ok());
  EXPECT_THAT(TakeKept(), IsEmpty());
  EXPECT_THAT(log_, HasSubstr("still lives"));
}

}  // namespace
}  // namespace presync
