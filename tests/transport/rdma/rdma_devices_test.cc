// Over a made-up sysfs.
#include "transport/rdma/rdma_devices.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <stdlib.h>

#include <filesystem>
#include <fstream>

namespace presync {
namespace {

using ::testing::HasSubstr;

class RdmaDevicesTest : public ::testing::Test {
 protected:
  RdmaDevicesTest() {
    char name[] = "/tmp/presync-rdma-devices-XXXXXX";
    root_ = ::mkdtemp(name);
  }
  ~RdmaDevicesTest() override { std::filesystem::remove_all(root_); }

  void Put(const std::string& path, const std::string& text) {
    std::filesystem::create_directories(std::filesystem::path(root_ + "/" + path).parent_path());
    std::ofstream(root_ + "/" + path) << text << "\n";
  }
  void AddDevice(const std::string& name, const std::string& state) {
    Put(name + "/node_type", "1: CA");
    Put(name + "/ports/1/state", state);
    Put(name + "/ports/1/link_layer", "Ethernet");
    Put(name + "/ports/1/gid_attrs/ndevs/0", "eth7");
  }

  std::string root_;
};

TEST_F(RdmaDevicesTest, ListsWhatTheKernelShows) {
  AddDevice("mlx5_1", "4: ACTIVE");
  AddDevice("mlx5_0", "1: DOWN");
  Put("iw0/node_type", "4: RNIC");
  const auto devices = ListRdmaDevices(root_);
  ASSERT_EQ(devices.size(), 3u);
  EXPECT_TRUE(devices[0].iwarp);
  EXPECT_TRUE(devices[0].ports.empty());
  EXPECT_EQ(devices[1].name, "mlx5_0");
  EXPECT_FALSE(devices[1].ports[0].active);
  EXPECT_EQ(devices[2].ports[0].netdev, "eth7");
  EXPECT_EQ(devices[2].ports[0].state, "ACTIVE");
  EXPECT_TRUE(devices[2].ports[0].active);
}

TEST_F(RdmaDevicesTest, SaysWhatWasLookedForAndWhatWasFound) {
  const absl::Status none = CheckRdmaDevices({}, root_ + "/missing");
  EXPECT_EQ(none.code(), absl::StatusCode::kUnimplemented);
  EXPECT_THAT(std::string(none.message()), HasSubstr(root_ + "/missing"));
  AddDevice("mlx5_0", "1: DOWN");
  EXPECT_THAT(std::string(CheckRdmaDevices({}, root_).message()),
              HasSubstr("mlx5_0 (port 1 DOWN)"));
  AddDevice("mlx5_1", "4: ACTIVE");
  EXPECT_TRUE(CheckRdmaDevices({}, root_).ok());
  EXPECT_TRUE(CheckRdmaDevices({"mlx5_1"}, root_).ok());
  const absl::Status other = CheckRdmaDevices({"mlx5_0", "mlx5_9"}, root_);
  EXPECT_THAT(std::string(other.message()), HasSubstr("mlx5_0, mlx5_9"));
}

TEST_F(RdmaDevicesTest, CountsCongestionNotificationsOfWhateverMake) {
  AddDevice("a", "4: ACTIVE");
  EXPECT_EQ(ReadCongestionMarks("a", 1, root_), 0u);
  Put("a/ports/1/hw_counters/rp_cnp_handled", "41");
  Put("a/ports/1/hw_counters/np_cnp_sent", "7");  // caused by others
  EXPECT_EQ(ReadCongestionMarks("a", 1, root_), 41u);
  Put("b/ports/2/hw_counters/rx_cnp_pkts", "5");
  EXPECT_EQ(ReadCongestionMarks("b", 2, root_), 5u);
}

}  // namespace
}  // namespace presync
