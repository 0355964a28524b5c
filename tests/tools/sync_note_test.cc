#include "tools/presyncd/sync_note.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <iterator>
#include <set>

namespace presync {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using Json = nlohmann::json;

class SyncNoteTest : public ::testing::Test {
 protected:
  SyncNoteTest() {
    char name[] = "/tmp/presync-sync-note-XXXXXX";
    folder_ = ::mkdtemp(name);
  }
  ~SyncNoteTest() override { std::filesystem::remove_all(folder_); }

  static SyncNote Note(const std::string& guest = "web1") {
    return {.guest = guest,
            .order = SyncOrder({{"command", "start"},
                                {"name", guest},
                                {"qmp", "/run/web1.qmp"},
                                {"to", "10.0.0.2:7350"},
                                {"max_launch_time", "150ms"},
                                {"max_bandwidth", ""},
                                {"rdma_queue_pairs", 2}}),
            .qemu = {.pid = 77, .start_ticks = 12345, .boot = "a-boot"}};
  }
  // As the presyncd that comes next does.
  std::vector<SyncNote> Read() {
    unreadable_.clear();
    return SyncNotes(folder_).ReadAll(&unreadable_);
  }
  std::string Bytes(const std::string& path) {
    std::ifstream in(path, std::ios::binary);
    return {std::istreambuf_iterator<char>(in), {}};
  }
  std::vector<std::string> Files() {
    std::vector<std::string> names;
    for (const auto& file : std::filesystem::directory_iterator(folder_)) {
      names.push_back(file.path().filename());
    }
    return names;
  }

  std::string folder_;
  std::vector<std::string> unreadable_;
};

TEST_F(SyncNoteTest, IsReadAsItWasWritten) {
  SyncNotes notes(folder_);
  ASSERT_TRUE(notes.Write(Note()).ok());
  const std::vector<SyncNote> all = Read();
  ASSERT_EQ(all.size(), 1u);
  EXPECT_EQ(all[0].guest, "web1");
  EXPECT_EQ(all[0].order, Note().order);
  EXPECT_EQ(all[0].qemu.pid, 77);
  EXPECT_EQ(all[0].qemu.start_ticks, 12345u);
  EXPECT_EQ(all[0].qemu.boot, "a-boot");
  EXPECT_THAT(Files(), ElementsAre("web1.sync"));
}

TEST_F(SyncNoteTest, IsNobodyElsesToRead) {
  const mode_t before = ::umask(0);
  SyncNotes notes(folder_);
  ASSERT_TRUE(notes.Write(Note()).ok());
  ::umask(before);
  struct stat st = {};
  ASSERT_EQ(::stat(notes.PathOf("web1").c_str(), &st), 0);
  EXPECT_EQ(st.st_mode & 0777, 0600u);
}

TEST_F(SyncNoteTest, AnOrderIsWhatWasSaidAndNothingElse) {
  const Json plain = {{"name", "g"}, {"qmp", "/q"}, {"to", "a:1"}};
  Json wordy = plain;
  wordy["command"] = "start";
  wordy["max_launch_time"] = "";
  wordy["transport"] = 7;  // not a text: as if not given
  wordy["rdma_queue_pairs"] = 0;
  wordy["whatever"] = Json::array({1});
  EXPECT_EQ(SyncOrder(wordy), plain);
  Json other = plain;
  other["transport"] = "tcp";
  EXPECT_NE(SyncOrder(other), SyncOrder(plain));
  EXPECT_THAT(SyncOrder(Json::array()), IsEmpty());
}

TEST_F(SyncNoteTest, ADomainsNameAndMonitorAreLibvirtsToSay) {
  const Json order = SyncOrder({{"name", "old"}, {"qmp", "/q"}, {"domain", "uuid"}, {"to", "a:1"}});
  EXPECT_EQ(order, (Json{{"domain", "uuid"}, {"to", "a:1"}}));
}

TEST_F(SyncNoteTest, ANewOneReplacesTheOld) {
  SyncNotes notes(folder_);
  ASSERT_TRUE(notes.Write(Note()).ok());
  SyncNote other = Note();
  other.order["to"] = "10.0.0.3:7350";
  ASSERT_TRUE(notes.Write(other).ok());
  const std::vector<SyncNote> all = Read();
  ASSERT_EQ(all.size(), 1u);
  EXPECT_EQ(all[0].order["to"], "10.0.0.3:7350");
}

TEST_F(SyncNoteTest, IsRemovedOnceAndLeavesTheOthers) {
  SyncNotes notes(folder_);
  ASSERT_TRUE(notes.Write(Note("a")).ok());
  ASSERT_TRUE(notes.Write(Note("b")).ok());
  ASSERT_TRUE(notes.Remove("a").ok());
  ASSERT_TRUE(notes.Remove("a").ok());
  ASSERT_TRUE(notes.Remove("never").ok());
  EXPECT_THAT(Files(), ElementsAre("b.sync"));
  SyncNotes later(folder_);
  (void)later.ReadAll(&unreadable_);
  ASSERT_TRUE(later.Remove("b").ok());
  EXPECT_THAT(Files(), IsEmpty());
}

TEST_F(SyncNoteTest, DifferentGuestsNeverShareAFile) {
  const SyncNotes notes(folder_);
  const std::vector<std::string> names = {"a.b", "a_b", "a-b", "a/b", "a=2fb", "..", ".", "a b"};
  std::set<std::string> paths;
  for (const std::string& name : names) {
    const std::string path = notes.PathOf(name);
    EXPECT_EQ(std::filesystem::path(path).parent_path(), folder_) << name;
    paths.insert(path);
  }
  EXPECT_EQ(paths.size(), names.size());
  SyncNotes writer(folder_);
  for (const std::string& name : names) EXPECT_TRUE(writer.Write(Note(name)).ok()) << name;
  EXPECT_EQ(Read().size(), names.size());
  EXPECT_TRUE(absl::IsInvalidArgument(writer.Write(Note(std::string(300, 'x')))));
}

TEST_F(SyncNoteTest, ATornOneIsNamedAndStays) {
  SyncNotes notes(folder_);
  ASSERT_TRUE(notes.Write(Note()).ok());
  const std::string path = notes.PathOf("web1");
  const std::string whole = Bytes(path);
  for (size_t size = 0; size < whole.size(); ++size) {
    std::ofstream(path, std::ios::binary | std::ios::trunc) << whole.substr(0, size);
    ASSERT_THAT(Read(), IsEmpty()) << size;
    ASSERT_EQ(unreadable_.size(), 1u) << size;
    ASSERT_THAT(unreadable_[0], HasSubstr(path));
  }
  for (size_t at = 0; at < whole.size(); at += 7) {
    std::string changed = whole;
    changed[at] = static_cast<char>(changed[at] ^ 1);
    EXPECT_FALSE(ParseSyncNote(changed).ok()) << at;
  }
  EXPECT_TRUE(std::filesystem::exists(path));
}

TEST_F(SyncNoteTest, OneBadFileHidesNoOther) {
  SyncNotes notes(folder_);
  ASSERT_TRUE(notes.Write(Note()).ok());
  std::ofstream(folder_ + "/bad.sync") << std::string(200'000, '[');
  std::filesystem::create_directory(folder_ + "/folder.sync");
  std::ofstream(folder_ + "/x.sync-new") << "left half-written";
  EXPECT_EQ(Read().size(), 1u);
  EXPECT_EQ(unreadable_.size(), 2u);
  EXPECT_FALSE(std::filesystem::exists(folder_ + "/x.sync-new"));
}

TEST_F(SyncNoteTest, AnotherGuestsPlaceIsNotBelieved) {
  SyncNotes notes(folder_);
  ASSERT_TRUE(notes.Write(Note()).ok());
  std::filesystem::copy(notes.PathOf("web1"), notes.PathOf("web2"));
  EXPECT_EQ(Read().size(), 1u);
  ASSERT_EQ(unreadable_.size(), 1u);
  EXPECT_THAT(unreadable_[0], HasSubstr("web2.sync"));
}

// What is right by its checksum, and says too little or what this presyncd does not know.
TEST_F(SyncNoteTest, WhatSaysTooLittleIsNoNote) {
  ASSERT_TRUE(ParseSyncNote(*EncodeSyncNote(Note())).ok());
  const auto fails = [](SyncNote note) { return !ParseSyncNote(*EncodeSyncNote(note)).ok(); };
  SyncNote note = Note();
  note.order.erase("to");
  EXPECT_TRUE(fails(note));
  note = Note();
  note.order.erase("qmp");
  EXPECT_TRUE(fails(note));
  note = Note();
  note.qemu.pid = 0;
  EXPECT_TRUE(fails(note));
  note = Note();
  note.qemu.start_ticks = 0;
  EXPECT_TRUE(fails(note));
  note = Note();
  note.qemu.boot.clear();
  EXPECT_TRUE(fails(note));
  EXPECT_TRUE(fails(Note("")));
  note = Note();
  note.order["glue"] = std::string(100'000, 'x');
  EXPECT_FALSE(EncodeSyncNote(note).ok());
}

TEST_F(SyncNoteTest, AFolderThatIsNotThereIsSaid) {
  SyncNotes notes(folder_ + "/nowhere");
  EXPECT_TRUE(absl::IsUnavailable(notes.Write(Note())));
  (void)notes.ReadAll(&unreadable_);
  EXPECT_EQ(unreadable_.size(), 1u);
}

}  // namespace
}  // namespace presync
