#include "transport/sync/handover_record.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <stdlib.h>

#include <filesystem>
#include <fstream>
#include <iterator>
#include <string>
#include <utility>
#include <vector>

namespace presync {
namespace {

class HandoverRecordTest : public ::testing::Test {
 protected:
  HandoverRecordTest() {
    char name[] = "/tmp/presync-record-test-XXXXXX";
    folder_ = ::mkdtemp(name);
  }
  ~HandoverRecordTest() override { std::filesystem::remove_all(folder_); }

  HandoverEntry Entry(HandoverPhase phase = HandoverPhase::kPreparing) {
    return {.role = HandoverRole::kSource,
            .phase = phase,
            .guest = "a guest/with \"odd\" name",
            .session = id_,
            .peer = "b:7350",
            .detail = "/run/x.qmp"};
  }
  std::vector<HandoverEntry> ReadAll() {
    unreadable_.clear();
    return HandoverRecord::ReadAll(folder_, &unreadable_);
  }

  std::string folder_;
  SessionId id_ = RandomId();
  std::vector<std::string> unreadable_;
};

TEST_F(HandoverRecordTest, TheNewestEntryCounts) {
  absl::StatusOr<HandoverRecord> record = HandoverRecord::Open(folder_, Entry());
  ASSERT_TRUE(record.ok()) << record.status();
  EXPECT_EQ(ReadAll().at(0).phase, HandoverPhase::kPreparing);
  ASSERT_TRUE(record->Append(HandoverPhase::kGivenUp).ok());
  const std::vector<HandoverEntry> entries = ReadAll();
  ASSERT_EQ(entries.size(), 1u);
  EXPECT_EQ(entries[0].phase, HandoverPhase::kGivenUp);
  EXPECT_EQ(entries[0].guest, Entry().guest);
  EXPECT_EQ(entries[0].session, id_);
  EXPECT_EQ(entries[0].detail, "/run/x.qmp");
}

TEST_F(HandoverRecordTest, AReservedRecordSaysNothingUntilItIsUsed) {
  absl::StatusOr<HandoverRecord> record = HandoverRecord::Reserve(folder_, Entry());
  ASSERT_TRUE(record.ok()) << record.status();
  EXPECT_FALSE(record->used());
  EXPECT_THAT(ReadAll(), ::testing::IsEmpty());
  EXPECT_THAT(unreadable_, ::testing::IsEmpty());
  ASSERT_TRUE(record->Append(HandoverPhase::kPreparing).ok());
  EXPECT_TRUE(record->used());
  HandoverRecord::RemoveUnused(folder_);
  EXPECT_EQ(ReadAll().at(0).phase, HandoverPhase::kPreparing);
}

TEST_F(HandoverRecordTest, RecordsThatWereNeverUsedAreRemoved) {
  absl::StatusOr<HandoverRecord> record = HandoverRecord::Reserve(folder_, Entry());
  ASSERT_TRUE(record.ok());
  std::ofstream(folder_ + "/x.source") << std::string(10'000, '{');
  HandoverRecord::RemoveUnused(folder_);
  EXPECT_FALSE(std::filesystem::exists(record->path()));
  EXPECT_TRUE(std::filesystem::exists(folder_ + "/x.source"));
}

TEST_F(HandoverRecordTest, ATornWriteLeavesTheEntryBeforeIt) {
  absl::StatusOr<HandoverRecord> record = HandoverRecord::Open(folder_, Entry());
  ASSERT_TRUE(record->Append(HandoverPhase::kGivenUp).ok());
  // The second block as a crash may leave it: only its first half is new.
  std::fstream file(record->path(), std::ios::in | std::ios::out | std::ios::binary);
  file.seekp(4096 + 2048);
  file.write(std::string(2048, '\0').data(), 2048);
  file.close();
  EXPECT_EQ(ReadAll().at(0).phase, HandoverPhase::kPreparing);
}

TEST_F(HandoverRecordTest, ManyHandoversOfOneSessionFit) {
  for (int i = 0; i < 5; ++i) {
    absl::StatusOr<HandoverRecord> record = HandoverRecord::Open(folder_, Entry());
    ASSERT_TRUE(record.ok());
    for (int j = 0; j < 10; ++j) ASSERT_TRUE(record->Append(HandoverPhase::kPreparing).ok());
    ASSERT_TRUE(record->Append(HandoverPhase::kGivenUp).ok());
    ASSERT_TRUE(record->Append(HandoverPhase::kTakenBack).ok());
  }
  EXPECT_EQ(ReadAll().at(0).phase, HandoverPhase::kTakenBack);
}

// A pass of recovery that had read "waiting" wrote "never-ran" behind "running".
TEST_F(HandoverRecordTest, WhatWasSaidForGoodIsNotTakenBack) {
  using enum HandoverPhase;
  for (const auto& [from, to] :
       std::vector<std::pair<HandoverPhase, HandoverPhase>>{{kRunning, kNeverRan},
                                                            {kRunning, kWaiting},
                                                            {kMoved, kTakenBack},
                                                            {kTakenBack, kMoved},
                                                            {kTakenBack, kGivenUp},
                                                            {kGivenUp, kPreparing},
                                                            {kMoved, kPreparing},
                                                            {kNeverRan, kToldToRun},
                                                            {kWaiting, kRunning},
                                                            {kRanUntold, kNeverRan}}) {
    id_ = RandomId();
    absl::StatusOr<HandoverRecord> record = HandoverRecord::Open(folder_, Entry(from));
    ASSERT_TRUE(record.ok());
    EXPECT_TRUE(absl::IsFailedPrecondition(record->Append(to)))
        << PhaseName(from) << " " << PhaseName(to);
    EXPECT_TRUE(absl::IsFailedPrecondition(HandoverRecord::Open(folder_, Entry(to)).status()))
        << "nor by who opens it anew";
    EXPECT_EQ(HandoverRecord::Read(folder_, Entry())->phase, from);
  }
}

TEST_F(HandoverRecordTest, WhoWritesKnowsWhatWasWrittenLast) {
  absl::StatusOr<HandoverRecord> first = HandoverRecord::Open(folder_, Entry());
  absl::StatusOr<HandoverRecord> second = HandoverRecord::Reserve(folder_, Entry());
  ASSERT_TRUE(first->Append(HandoverPhase::kGivenUp).ok());
  EXPECT_TRUE(absl::IsFailedPrecondition(second->Append(HandoverPhase::kPreparing)));
  EXPECT_EQ(ReadAll().at(0).phase, HandoverPhase::kGivenUp);
}

TEST_F(HandoverRecordTest, ARestartKnowsTheProcessAndTheOrder) {
  HandoverEntry entry = Entry();
  entry.process = "4711 1234567 a-boot";
  ASSERT_TRUE(HandoverRecord::Open(folder_, entry).ok());
  const HandoverEntry first = ReadAll().at(0);
  EXPECT_EQ(first.process, entry.process);
  EXPECT_FALSE(first.at.boot.empty());
  EXPECT_GT(first.sequence, 0u);
  id_ = RandomId();
  ASSERT_TRUE(HandoverRecord::Open(folder_, Entry()).ok());
  EXPECT_GT(HandoverRecord::Read(folder_, Entry())->sequence, first.sequence);
}

TEST_F(HandoverRecordTest, GarbageIsNamedAndNotBelieved) {
  std::ofstream(folder_ + "/x.source") << std::string(10'000, '{');
  EXPECT_THAT(ReadAll(), ::testing::IsEmpty());
  EXPECT_EQ(unreadable_.size(), 1u);
}

TEST_F(HandoverRecordTest, ANameTellsWhoseOneThatCantBeReadMayBe) {
  HandoverEntry entry = Entry();
  entry.guest = "web.1";
  const std::string path = HandoverRecord::Path(folder_, entry);
  EXPECT_TRUE(HandoverRecord::MayBeOf(path, "web.1"));
  EXPECT_TRUE(HandoverRecord::MayBeOf(path, "web_1")) << "nobody can tell";
  EXPECT_FALSE(HandoverRecord::MayBeOf(path, "web"));
  EXPECT_FALSE(HandoverRecord::MayBeOf(path, "web.10"));
}

TEST_F(HandoverRecordTest, ARemovedRecordIsGone) {
  absl::StatusOr<HandoverRecord> record = HandoverRecord::Open(folder_, Entry());
  ASSERT_TRUE(record->Remove().ok());
  EXPECT_THAT(ReadAll(), ::testing::IsEmpty());
}

}  // namespace
}  // namespace presync
