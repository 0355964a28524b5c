#include "transport/sync/write_recorder.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <random>
#include <set>
#include <utility>
#include <vector>

#include "tests/transport/sync/model_guest.h"

namespace presync {
namespace {

using ::testing::ElementsAre;
using ::testing::IsEmpty;

const std::vector<PageCount> kRegions = {100, 28};
constexpr PageCount kPages = 128;

std::vector<PageRun> Peek(DirtyLog* log) {
  std::vector<PageRun> written;
  EXPECT_TRUE(log->Peek(&written).ok());
  return written;
}

class WriteRecorderTest : public ::testing::Test {
 protected:
  WriteRecorderTest() : memory_(kRegions), recorder_(memory_.MakeLog(), &memory_.memory()) {}

  void Write(std::initializer_list<PageIndex> pages) {
    for (PageIndex page : pages) memory_.Write(page, ++value_);
  }
  std::vector<PageRun> Scan() {
    std::vector<PageRun> written = {{1, 1}};  // to be replaced
    EXPECT_TRUE(recorder_.TakeScan(&written).ok());
    return written;
  }

  ModelMemory memory_;
  WriteRecorder recorder_;
  uint64_t value_ = 0;
};

TEST_F(WriteRecorderTest, WithoutARecordingItIsTheLogBehind) {
  const std::vector<PageRun> runs = {{3, 4}, {50, 1}};
  ASSERT_TRUE(recorder_.Arm(runs).ok());
  Write({3, 5, 6, 9, 50});
  EXPECT_THAT(Peek(&recorder_), ElementsAre(PageRun{3, 1}, PageRun{5, 2}, PageRun{50, 1}));
  Write({3, 4});
  EXPECT_THAT(Peek(&recorder_), ElementsAre(PageRun{4, 1}));
  EXPECT_EQ(memory_.faults(), 5u);
}

TEST_F(WriteRecorderTest, RecordsEachPageOnceAScanWhoeverArmedIt) {
  const std::vector<PageRun> runs = {{3, 1}};
  ASSERT_TRUE(recorder_.Arm(runs).ok());
  ASSERT_TRUE(recorder_.StartRecording().ok());
  Write({3, 3, 7, 99, 100});
  EXPECT_THAT(Scan(), ElementsAre(PageRun{3, 1}, PageRun{7, 1}, PageRun{99, 1}, PageRun{100, 1}));
  Write({7});
  EXPECT_THAT(Scan(), ElementsAre(PageRun{7, 1}));
  EXPECT_THAT(Scan(), IsEmpty());
}

TEST_F(WriteRecorderTest, ArmingByTheUserHidesNoWriteFromTheRecording) {
  ASSERT_TRUE(recorder_.StartRecording().ok());
  Write({7});
  const std::vector<PageRun> runs = {{7, 1}};
  ASSERT_TRUE(recorder_.Arm(runs).ok());
  EXPECT_THAT(Peek(&recorder_), IsEmpty()) << "the write came before the arming";
  EXPECT_THAT(Scan(), ElementsAre(PageRun{7, 1}));
}

TEST_F(WriteRecorderTest, AWriteBeforeTheRecordingIsTheUsersAlone) {
  const std::vector<PageRun> runs = {{7, 2}};
  ASSERT_TRUE(recorder_.Arm(runs).ok());
  Write({7});
  ASSERT_TRUE(recorder_.StartRecording().ok());
  EXPECT_THAT(Scan(), IsEmpty());
  EXPECT_THAT(Peek(&recorder_), ElementsAre(PageRun{7, 1}));
}

TEST_F(WriteRecorderTest, WhatTheUserWasNotToldSurvivesTheRecordingsEnd) {
  const std::vector<PageRun> runs = {{7, 2}};
  ASSERT_TRUE(recorder_.Arm(runs).ok());
  ASSERT_TRUE(recorder_.StartRecording().ok());
  Write({7, 20});
  EXPECT_THAT(Scan(), ElementsAre(PageRun{7, 1}, PageRun{20, 1}));
  recorder_.StopRecording();
  Write({8, 30});
  EXPECT_THAT(Peek(&recorder_), ElementsAre(PageRun{7, 2}));
  EXPECT_THAT(Peek(&recorder_), IsEmpty());
}

TEST_F(WriteRecorderTest, ALogThatFailsEndsNothingQuietly) {
  ASSERT_TRUE(recorder_.StartRecording().ok());
  memory_.Die();
  std::vector<PageRun> written;
  EXPECT_TRUE(absl::IsUnavailable(recorder_.TakeScan(&written)));
  EXPECT_TRUE(absl::IsUnavailable(recorder_.Peek(&written)));
}

// The user sees what it would see without a recording; the recording sees every page written.
TEST(WriteRecorderRandom, UserAndRecordingSeeExactlyWhatWasWritten) {
  for (uint32_t seed = 1; seed <= 200; ++seed) {
    SCOPED_TRACE(seed);
    std::mt19937 random(seed);
    ModelMemory plain(kRegions), recorded(kRegions);
    const std::unique_ptr<DirtyLog> expected = plain.MakeLog();
    WriteRecorder recorder(recorded.MakeLog(), &recorded.memory());
    std::set<PageIndex> written;
    for (int step = 0; step < 300; ++step) {
      const auto page = static_cast<PageIndex>(random() % kPages);
      switch (random() % 8) {
        case 0: {
          const PageCount count = 1 + random() % 9;
          const PageRun run = {page, std::min<PageCount>(count, kPages - page)};
          const std::vector<PageRun> runs = plain.memory().SplitAtRegions(run);
          ASSERT_TRUE(expected->Arm(runs).ok());
          ASSERT_TRUE(recorder.Arm(runs).ok());
          break;
        }
        case 1:
          ASSERT_EQ(Peek(&recorder), Peek(expected.get()));
          break;
        case 2:
          if (random() % 10 != 0) break;
          if (recorder.recording()) {
            recorder.StopRecording();
          } else {
            ASSERT_TRUE(recorder.StartRecording().ok());
            written.clear();
          }
          break;
        case 3:
          if (recorder.recording()) {
            std::vector<PageRun> scan;
            ASSERT_TRUE(recorder.TakeScan(&scan).ok());
            std::vector<PageIndex> pages;
            for (const PageRun& run : scan) {
              ASSERT_TRUE(recorded.memory().IsWithinOneRegion(run));
              for (PageIndex p = run.first; p < run.end(); ++p) pages.push_back(p);
            }
            ASSERT_EQ(pages, std::vector<PageIndex>(written.begin(), written.end()));
            written.clear();
          }
          break;
        default:
          plain.Write(page, seed + step);
          recorded.Write(page, seed + step);
          written.insert(page);
      }
    }
  }
}

}  // namespace
}  // namespace presync
