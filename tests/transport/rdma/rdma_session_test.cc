// Whole sessions over RDMA: a sync and its handover, the fall to TCP in the middle, and the way
// back. The control connection is on loopback, so that it outlives the RDMA path.
#include "tests/transport/rdma/rdma_fixture.h"
#include "tests/transport/sync/session_fixture.h"

namespace presync {
namespace {

using ::testing::HasSubstr;

class RdmaSessionTest : public SessionTest, public ::testing::WithParamInterface<TestDevice> {
 protected:
  RdmaSessionTest() {
    patience_ = 24000;  // 2 minutes: the devices, and the machine, may be emulated
    source_options_.rdma.queue_pairs = 2;
    source_options_.rdma_retry = absl::Milliseconds(300);
    source_options_.rdma_retry_longest = absl::Seconds(2);
    source_options_.log = [this](bool, const std::string& line) {
      absl::MutexLock lock(&running_mutex_);
      lines_.push_back(line);
    };
    RestartTarget({GetParam().address});
  }
  ~RdmaSessionTest() override {
    StopWriting();
    session_.reset();  // it logs to lines_
    for (const std::string& line : lines_) std::printf("  log: %s\n", line.c_str());
  }

  void RestartTarget(std::vector<std::string> addresses) {
    service_.reset();
    target_options_.rdma.addresses = std::move(addresses);
    StartTarget();
  }

  bool AwaitLink(const std::string& link) {
    return Await([&] { return session_->status().link == link; });
  }
  bool AwaitSynced() {
    return Await([&] { return session_->status().progress.residual == 0; });
  }

  std::vector<std::string> lines_;
};

TEST_P(RdmaSessionTest, MovesAWritingGuestByteForByte) {
  StartWriting();
  ASSERT_TRUE(StartSession().ok());
  EXPECT_EQ(session_->status().link, "rdma") << session_->status().link_reason;
  EXPECT_EQ(session_->status().link_devices, std::vector<std::string>{GetParam().name});
  ASSERT_TRUE(AwaitState(SessionState::kSyncing));
  const absl::StatusOr<HandoverReport> report = Launch();
  ASSERT_TRUE(report.ok()) << report.status();
  EXPECT_TRUE(world_.target_running());
  EXPECT_EQ(report->pages_compared, kPages);
  EXPECT_EQ(report->pages_differing, 0u);
  EXPECT_THAT(Differences(), ::testing::IsEmpty());
}

TEST_P(RdmaSessionTest, ATargetWithoutADeviceThereGetsTcpAndTheReason) {
  RestartTarget({"127.0.0.1"});
  ASSERT_TRUE(StartSession().ok());
  EXPECT_EQ(session_->status().link, "tcp");
  EXPECT_THAT(session_->status().link_reason, HasSubstr("127.0.0.1"));
  ASSERT_TRUE(Launch().ok());
  EXPECT_THAT(Differences(), ::testing::IsEmpty());
}

TEST_P(RdmaSessionTest, FallsToTcpInTheMiddleKeepsWhatWasSyncedAndComesBack) {
  if (!RdmaIsRequired()) GTEST_SKIP() << "sets network devices down: lab only";
  StartWriting();
  ASSERT_TRUE(StartSession().ok());
  ASSERT_EQ(session_->status().link, "rdma") << session_->status().link_reason;
  ASSERT_TRUE(AwaitState(SessionState::kSyncing));
  {
    const PathCut cut(GetParam());
    ASSERT_TRUE(AwaitLink("tcp"));
    EXPECT_EQ(session_->status().reconnects, 0u);
    EXPECT_THAT(session_->status().link_reason, HasSubstr("RDMA failed"));
    EXPECT_NE(session_->status().state, SessionState::kConnecting);
    StopWriting();
    ASSERT_TRUE(AwaitSynced());
    EXPECT_THAT(Differences(), ::testing::IsEmpty());
  }
  ASSERT_TRUE(AwaitLink("rdma")) << session_->status().link_reason;
  EXPECT_EQ(session_->status().reconnects, 0u);
  EXPECT_EQ(host_.places_made(), 1);
  source_.Write(5, 4711);
  ASSERT_TRUE(Launch().ok());
  EXPECT_EQ(session_->status().reconnects, 0u);
  EXPECT_THAT(Differences(), ::testing::IsEmpty());
}

// What was confirmed before RDMA failed is not sent again.
TEST_P(RdmaSessionTest, SendsOnlyWhatWasUnderWayAgain) {
  if (!RdmaIsRequired()) GTEST_SKIP() << "sets network devices down: lab only";
  ASSERT_TRUE(StartSession().ok());
  ASSERT_EQ(session_->status().link, "rdma") << session_->status().link_reason;
  ASSERT_TRUE(AwaitState(SessionState::kSyncing));
  ASSERT_TRUE(AwaitSynced());
  const uint64_t sent = session_->status().progress.pages_sent;
  const PathCut cut(GetParam());
  source_.Write(7, 4711);  // so that the link has something to fail with
  ASSERT_TRUE(AwaitLink("tcp"));
  ASSERT_TRUE(AwaitSynced());
  EXPECT_LE(session_->status().progress.pages_sent, sent + 2);
  EXPECT_THAT(Differences(), ::testing::IsEmpty());
}

TEST_P(RdmaSessionTest, ComesToRdmaWhenTheTargetHasItLater) {
  RestartTarget({"127.0.0.1"});
  const uint16_t port = port_;
  StartWriting();
  ASSERT_TRUE(StartSession().ok());
  ASSERT_EQ(session_->status().link, "tcp");
  ASSERT_TRUE(AwaitState(SessionState::kSyncing));
  service_.reset();
  target_options_.rdma.addresses = {GetParam().address};
  StartTarget(port);
  ASSERT_TRUE(AwaitLink("rdma")) << session_->status().link_reason;
  ASSERT_TRUE(AwaitState(SessionState::kSyncing));
  ASSERT_TRUE(Launch().ok());
  EXPECT_THAT(Differences(), ::testing::IsEmpty());
}

GTEST_ALLOW_UNINSTANTIATED_PARAMETERIZED_TEST(RdmaSessionTest);
INSTANTIATE_TEST_SUITE_P(Devices, RdmaSessionTest, ::testing::ValuesIn(TestDevices()),
                         [](const auto& device) { return device.param.name; });

TEST(RdmaSession, HasADevice) { PRESYNC_NEEDS_RDMA(); }

}  // namespace
}  // namespace presync
