#include "transport/sync/session_recording.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <vector>

#include "tests/transport/sync/model_guest.h"
#include "transport/clock.h"

namespace presync {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;

constexpr absl::Duration kInterval = absl::Milliseconds(100);
constexpr size_t kAll = 1000;

class SessionRecordingTest : public ::testing::Test {
 protected:
  SessionRecordingTest() : memory_({64}), recorder_(memory_.MakeLog(), &memory_.memory()) {}

  void Write(std::initializer_list<PageIndex> pages) {
    for (PageIndex page : pages) memory_.Write(page, 1);
  }
  void StepAfter(absl::Duration passed) {
    now_ += passed;
    EXPECT_TRUE(recording_.Step(&recorder_, now_).ok());
  }
  RecordedPart Take(size_t most = kAll) {
    absl::StatusOr<RecordedPart> part = recording_.Take(most);
    EXPECT_TRUE(part.ok()) << part.status();
    return part.ok() ? *std::move(part) : RecordedPart{};
  }

  ModelMemory memory_;
  WriteRecorder recorder_;
  SessionRecording recording_;
  absl::Time now_ = MonotonicNow();
};

TEST_F(SessionRecordingTest, HandsOutEachScanOnceAndInOrder) {
  ASSERT_TRUE(recording_.Start(kInterval).ok());
  StepAfter(absl::ZeroDuration());
  Write({1, 2, 9});
  StepAfter(kInterval / 2);  // not due yet
  EXPECT_THAT(Take().ends, IsEmpty());
  StepAfter(kInterval / 2);
  StepAfter(kInterval);
  Write({2});
  StepAfter(kInterval);
  const RecordedPart part = Take();
  EXPECT_THAT(part.runs, ElementsAre(PageRun{1, 2}, PageRun{9, 1}, PageRun{2, 1}));
  EXPECT_THAT(part.ends, ElementsAre(2, 2, 3));
  EXPECT_EQ(part.missed, 0u);
  EXPECT_FALSE(part.ended);
  EXPECT_THAT(Take().runs, IsEmpty());
}

TEST_F(SessionRecordingTest, CutsALongScanWithoutLosingARun) {
  ASSERT_TRUE(recording_.Start(kInterval).ok());
  StepAfter(absl::ZeroDuration());
  Write({1, 3, 5});
  StepAfter(kInterval);
  Write({7});
  StepAfter(kInterval);
  RecordedPart part = Take(2);
  EXPECT_THAT(part.runs, ElementsAre(PageRun{1, 1}, PageRun{3, 1}));
  EXPECT_THAT(part.ends, IsEmpty());
  part = Take(2);
  EXPECT_THAT(part.runs, ElementsAre(PageRun{5, 1}, PageRun{7, 1}));
  EXPECT_THAT(part.ends, ElementsAre(1, 2));
}

TEST_F(SessionRecordingTest, ALateScanStandsForTheOnesThatWereMissed) {
  ASSERT_TRUE(recording_.Start(kInterval).ok());
  StepAfter(absl::ZeroDuration());
  Write({4});
  StepAfter(3.5 * kInterval);
  RecordedPart part = Take();
  EXPECT_THAT(part.ends, ElementsAre(0, 0, 1));
  EXPECT_EQ(part.missed, 2u);
  StepAfter(0.5 * kInterval);  // back on the grid
  EXPECT_THAT(Take().ends, ElementsAre(0));
}

TEST_F(SessionRecordingTest, OneAtATimeAndStoppedByWhoWantsTo) {
  EXPECT_TRUE(absl::IsNotFound(recording_.Take(kAll).status()));
  EXPECT_TRUE(absl::IsNotFound(recording_.Stop()));
  ASSERT_TRUE(recording_.Start(kInterval).ok());
  EXPECT_TRUE(absl::IsAlreadyExists(recording_.Start(kInterval)));
  StepAfter(absl::ZeroDuration());
  Write({4});
  StepAfter(kInterval);
  ASSERT_TRUE(recording_.Stop().ok());
  StepAfter(kInterval);
  EXPECT_FALSE(recorder_.recording());
  const RecordedPart part = Take();
  EXPECT_THAT(part.ends, ElementsAre(1));
  EXPECT_TRUE(part.ended);
  EXPECT_EQ(part.problem, "");
  ASSERT_TRUE(recording_.Start(kInterval).ok());
}

TEST_F(SessionRecordingTest, NobodyFetchesSoItEnds) {
  ASSERT_TRUE(recording_.Start(kInterval).ok());
  StepAfter(absl::ZeroDuration());
  EXPECT_TRUE(recorder_.recording());
  StepAfter(absl::Minutes(1));
  EXPECT_FALSE(recorder_.recording());
  EXPECT_THAT(Take().problem, HasSubstr("nobody fetched"));
}

TEST_F(SessionRecordingTest, AGuestThatEndsEndsItWithTheReason) {
  ASSERT_TRUE(recording_.Start(kInterval).ok());
  StepAfter(absl::ZeroDuration());
  memory_.Die();
  now_ += kInterval;
  EXPECT_TRUE(absl::IsUnavailable(recording_.Step(&recorder_, now_)));
  const RecordedPart part = Take();
  EXPECT_TRUE(part.ended);
  EXPECT_THAT(part.problem, HasSubstr("gone"));
}

TEST_F(SessionRecordingTest, RefusesIntervalsThatItCannotKeep) {
  EXPECT_TRUE(absl::IsOutOfRange(recording_.Start(absl::Microseconds(9999))));
  EXPECT_TRUE(absl::IsOutOfRange(recording_.Start(absl::Seconds(61))));
}

}  // namespace
}  // namespace presync
