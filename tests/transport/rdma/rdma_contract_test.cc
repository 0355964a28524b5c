// The links' contract over every RDMA device of this machine: soft-RoCE and soft-iWARP in the lab.
#include "tests/transport/link_contract.h"
#include "tests/transport/rdma/rdma_fixture.h"

namespace presync {
namespace {

LinkKind Kind(const std::string& name, std::vector<std::string> addresses, uint32_t queue_pairs,
              uint64_t max_write_bytes = uint64_t{1} << 20) {
  return {name,
          [=](const GuestMemory& source, const GuestMemory& target) -> absl::StatusOr<LinkPair> {
            RdmaSourceOptions options = TestOptions(queue_pairs);
            options.max_write_bytes = max_write_bytes;
            absl::StatusOr<RdmaPair> pair = ConnectPair(addresses, options, source, target);
            if (!pair.ok()) return pair.status();
            LinkPair link;
            link.source = std::move(pair->source);
            link.target = std::move(pair->target);
            return link;
          },
          /*fills_holes=*/true};
}

std::vector<LinkKind> Kinds() {
  std::vector<LinkKind> kinds;
  std::vector<std::string> all;
  for (const TestDevice& device : TestDevices()) {
    kinds.push_back(Kind(device.name + "_1", {device.address}, 1));
    kinds.push_back(Kind(device.name + "_4", {device.address}, 4, 16 << 10));
    all.push_back(device.address);
  }
  if (all.size() > 1) kinds.push_back(Kind("all_devices", all, 2));
  return kinds;
}

GTEST_ALLOW_UNINSTANTIATED_PARAMETERIZED_TEST(LinkContract);
INSTANTIATE_TEST_SUITE_P(Rdma, LinkContract, ::testing::ValuesIn(Kinds()),
                         [](const auto& kind) { return kind.param.name; });

TEST(RdmaContract, HasADevice) { PRESYNC_NEEDS_RDMA(); }

}  // namespace
}  // namespace presync
