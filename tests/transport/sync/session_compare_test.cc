// `presync verify` and the background audit, over real sockets on loopback, with a model guest.
#include "tests/transport/sync/session_fixture.h"

namespace presync {
namespace {

using ::testing::Contains;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;

class SessionCompareTest : public SessionTest {
 protected:
  ~SessionCompareTest() override {
    StopWriting();
    session_.reset();  // it logs here
  }
  void Sync() {
    source_options_.log = [this](bool problem, const std::string& line) {
      MutexLock lock(&log_mutex_);
      if (problem) problems_.push_back(line);
    };
    ASSERT_TRUE(StartSession().ok());
    ASSERT_TRUE(AwaitState(SessionState::kSyncing));
  }
  void SyncAll() {
    Sync();
    ASSERT_TRUE(Await([&] { return session_->status().progress.residual == 0; }));
    ASSERT_TRUE(Await([&] { return session_->status().progress.unsettled == 0; }));
  }
  std::vector<std::string> Problems() {
    MutexLock lock(&log_mutex_);
    return problems_;
  }

 private:
  Mutex log_mutex_;
  std::vector<std::string> problems_;
};

TEST_F(SessionCompareTest, VerifyFindsNamesAndMendsASpoiledPage) {
  SyncAll();
  host_.memory().scratch().FillPage(800, 4711);
  host_.memory().scratch().FillPage(701, 4711);  // zero at the source
  absl::StatusOr<ComparisonReport> report = session_->Verify();
  ASSERT_TRUE(report.ok()) << report.status();
  EXPECT_EQ(report->compared, kPages);
  EXPECT_THAT(report->named, ElementsAre(701, 800));
  EXPECT_THAT(Problems(), Contains(HasSubstr("2 pages DIFFER")));
  ASSERT_TRUE(Await([&] { return session_->status().progress.residual == 0; }));
  EXPECT_THAT(Differences(), IsEmpty());
  report = session_->Verify();
  ASSERT_TRUE(report.ok()) << report.status();
  EXPECT_EQ(report->differing, 0u);
  EXPECT_EQ(session_->status().comparisons.pages_differing, 2u);
}

// Two pages change as a read that was under way changes them. With the guest's devices saying that
// nothing of the kind can be, these are faults; while it may be, they are not.
TEST_F(SessionCompareTest, WhatAReadMayHaveChangedIsMendedAndNoFault) {
  source_.set_longest_read(absl::InfiniteDuration());
  Sync();
  ASSERT_TRUE(Await([&] { return session_->status().progress.residual == 0; }));
  source_.WriteUnseen(800, 4711);
  source_.WriteUnseen(702, 4712);
  const absl::StatusOr<ComparisonReport> report = session_->Verify();
  ASSERT_TRUE(report.ok()) << report.status();
  EXPECT_EQ(report->differing, 0u);
  EXPECT_EQ(report->repaired, 2u);
  EXPECT_EQ(report->compared + report->aside, kPages);
  EXPECT_THAT(Problems(), IsEmpty());
  ASSERT_TRUE(Await([&] { return session_->status().progress.residual == 0; }));
  EXPECT_THAT(Differences(), IsEmpty());
}

// What a read of a disk changed after it was sent, unseen, is found when the guest stands still.
class UnseenReadTest : public SessionCompareTest, public ::testing::WithParamInterface<bool> {};

TEST_P(UnseenReadTest, ALaunchFindsWhatAReadHasChanged) {
  source_.set_longest_read(absl::InfiniteDuration());
  Sync();
  ASSERT_TRUE(Await([&] { return session_->status().progress.residual == 0; }));
  source_.WriteUnseen(800, 4711);
  const absl::StatusOr<HandoverReport> report = Launch(GetParam());
  ASSERT_TRUE(report.ok()) << report.status();
  EXPECT_EQ(report->unsettled_differing, 1u);
  EXPECT_GT(report->unsettled_pages, kPages / 4);
  EXPECT_EQ(report->pages_differing, 0u);
  EXPECT_THAT(Differences(), IsEmpty());
}

INSTANTIATE_TEST_SUITE_P(Verify, UnseenReadTest, ::testing::Bool());

// A read that lasted for longer than anything had before fills a page that was compared meanwhile.
TEST_F(SessionCompareTest, ALaunchDoubtsWhatWasPresumed) {
  SyncAll();
  source_.set_longest_read(absl::Seconds(40));  // as the look after the stop will say
  source_.WriteUnseen(800, 4711);
  const absl::StatusOr<HandoverReport> report = Launch(/*verify=*/false);
  ASSERT_TRUE(report.ok()) << report.status();
  EXPECT_EQ(report->unsettled_differing, 1u);
  EXPECT_THAT(Differences(), IsEmpty());
}

// Pages that were sent while a read may have been filling them are compared by themselves, later.
TEST_F(SessionCompareTest, PagesAreSettledByAndByAndMendedThen) {
  source_.set_longest_read(absl::InfiniteDuration());
  Sync();
  ASSERT_TRUE(Await([&] { return session_->status().progress.residual == 0; }));
  source_.WriteUnseen(4, 4711);
  source_.set_longest_read(absl::ZeroDuration());
  ASSERT_TRUE(Await([&] { return session_->status().comparisons.pages_repaired == 1; }));
  ASSERT_TRUE(Await([&] { return session_->status().progress.unsettled == 0; }));
  EXPECT_THAT(Differences(), IsEmpty());
  EXPECT_EQ(session_->status().comparisons.pages_differing, 0u);
}

TEST_F(SessionCompareTest, AGuestThatWritesIsComparedAndFoundEqual) {
  StartWriting();
  Sync();
  for (int i = 0; i < 8; ++i) {
    const absl::StatusOr<ComparisonReport> report = session_->Verify();
    ASSERT_TRUE(report.ok()) << report.status();
    EXPECT_EQ(report->differing, 0u);
    EXPECT_EQ(report->compared + report->aside, kPages);
    EXPECT_GT(report->compared, 0u);
  }
  EXPECT_TRUE(Launch().ok());
  EXPECT_THAT(Differences(), IsEmpty());
}

TEST_F(SessionCompareTest, TheAuditComesRoundAndFindsWhatIsSpoiled) {
  source_options_.audit_bytes_per_s = 100'000'000;
  SyncAll();
  // One that began before all was copied leaves that aside.
  ASSERT_TRUE(Await([&] { return session_->status().comparisons.audit.compared == kPages; }));
  EXPECT_GT(session_->status().comparisons.audits, 0u);
  EXPECT_EQ(session_->status().comparisons.pages_differing, 0u);
  host_.memory().scratch().FillPage(17, 4711);
  ASSERT_TRUE(Await([&] { return session_->status().comparisons.pages_differing == 1; }));
  EXPECT_THAT(Problems(), Contains(HasSubstr("1 page DIFFERS")));
  ASSERT_TRUE(Await([&] { return session_->status().progress.residual == 0; }));
  EXPECT_THAT(Differences(), IsEmpty());
}

TEST_F(SessionCompareTest, ALaunchInTheMiddleOfAuditsWorks) {
  source_options_.audit_bytes_per_s = 1'000'000'000;
  StartWriting();
  Sync();
  ASSERT_TRUE(Await([&] { return session_->status().comparisons.audits > 0; }));
  const absl::StatusOr<HandoverReport> report = Launch();
  ASSERT_TRUE(report.ok()) << report.status();
  EXPECT_EQ(report->pages_differing, 0u);
  EXPECT_THAT(Differences(), IsEmpty());
}

TEST_F(SessionCompareTest, WithoutALinkOrAfterTheEndVerifyIsRefused) {
  SyncAll();
  *up_ = false;
  service_->CloseConnections();
  ASSERT_TRUE(AwaitState(SessionState::kConnecting));
  EXPECT_EQ(session_->Verify().status().code(), absl::StatusCode::kFailedPrecondition);
  *up_ = true;
  ASSERT_TRUE(AwaitState(SessionState::kSyncing));
  EXPECT_TRUE(session_->Verify().ok());
  ASSERT_TRUE(session_->Stop().ok());
  EXPECT_EQ(session_->Verify().status().code(), absl::StatusCode::kFailedPrecondition);
}

// Whoever waits for a comparison is told what ended it.
TEST_F(SessionCompareTest, WhateverEndsTheSyncEndsTheWait) {
  StartWriting();
  Sync();
  for (int i = 0; i < 4; ++i) {
    std::thread waiting([&] {
      while (session_->Verify().ok()) {
      }
    });
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
    if (i == 3) {
      EXPECT_TRUE(session_->Stop().ok());
    } else {
      service_->CloseConnections();
    }
    waiting.join();
    if (i < 3) {
      ASSERT_TRUE(AwaitState(SessionState::kSyncing));
    }
  }
}

}  // namespace
}  // namespace presync
