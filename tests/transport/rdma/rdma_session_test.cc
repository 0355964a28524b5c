// Whole sessions over RDMA: a sync and its handover, targets without a device, and the way to RDMA
// while TCP carries the sync. Failing paths are in rdma_path_test.cc.
#include "tests/transport/rdma/rdma_session_fixture.h"

namespace presync {
namespace {

using ::testing::HasSubstr;

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
