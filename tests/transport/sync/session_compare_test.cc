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
