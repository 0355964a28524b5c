#include "tests/transport/rdma/rdma_fixture.h"

#include <arpa/inet.h>
#include <gtest/gtest.h>
#include <ifaddrs.h>
#include <stdlib.h>

#include <utility>

#include "transport/clock.h"
#include "transport/rdma/connection_manager.h"

namespace presync {
namespace {

std::vector<std::string> LocalAddresses() {
  std::vector<std::string> addresses;
  ifaddrs* all = nullptr;
  if (getifaddrs(&all) != 0) return addresses;
  for (const ifaddrs* each = all; each != nullptr; each = each->ifa_next) {
    if (each->ifa_addr == nullptr || each->ifa_addr->sa_family != AF_INET) continue;
    char text[INET_ADDRSTRLEN];
    const auto* in = reinterpret_cast<const sockaddr_in*>(each->ifa_addr);
    inet_ntop(AF_INET, &in->sin_addr, text, sizeof(text));
    if (std::string(text).rfind("127.", 0) != 0) addresses.emplace_back(text);
  }
  freeifaddrs(all);
  return addresses;
}

std::vector<TestDevice> FindDevices() {
  std::vector<TestDevice> devices;
  absl::StatusOr<std::unique_ptr<CmChannel>> channel = CmChannel::Open();
  if (!channel.ok() || !CheckRdma({}).ok()) return devices;
  for (const std::string& address : LocalAddresses()) {
    absl::StatusOr<CmId> id = (*channel)->MakeId();
    if (id.ok() && ListenAt(*id, address).ok()) devices.push_back({DeviceName(*id), address});
  }
  return devices;
}

// The network device that has this IPv4 address.
std::string NetdevOf(const std::string& address) {
  std::string name;
  ifaddrs* all = nullptr;
  if (getifaddrs(&all) != 0) return name;
  for (const ifaddrs* each = all; each != nullptr; each = each->ifa_next) {
    if (each->ifa_addr == nullptr || each->ifa_addr->sa_family != AF_INET) continue;
    char text[INET_ADDRSTRLEN];
    const auto* in = reinterpret_cast<const sockaddr_in*>(each->ifa_addr);
    inet_ntop(AF_INET, &in->sin_addr, text, sizeof(text));
    if (address == text) name = each->ifa_name;
  }
  freeifaddrs(all);
  return name;
}

void SetLink(const std::string& netdev, const char* state) {
  const std::string command = "ip link set dev " + netdev + " " + state;
  EXPECT_EQ(::system(command.c_str()), 0) << command;
}

}  // namespace

PathCut::PathCut(const TestDevice& device) : netdev_(NetdevOf(device.address)) {
  SetLink(netdev_, "down");
}

PathCut::~PathCut() { SetLink(netdev_, "up"); }

const std::vector<TestDevice>& TestDevices() {
  static const auto* const devices = new std::vector<TestDevice>(FindDevices());
  return *devices;
}

bool RdmaIsRequired() { return ::getenv("PRESYNC_RDMA_REQUIRED") != nullptr; }

RdmaSourceOptions TestOptions(uint32_t queue_pairs) {
  RdmaSourceOptions options;
  options.queue_pairs = queue_pairs;
  options.queue_bytes = uint64_t{1} << 20;
  options.stall_timeout = kTestStall;
  return options;
}

absl::StatusOr<RdmaPair> ConnectPair(const std::vector<std::string>& addresses,
                                     const RdmaSourceOptions& options, const GuestMemory& source,
                                     const GuestMemory& target) {
  const absl::Time deadline = MonotonicNow() + absl::Seconds(60);
  RdmaListen listen = {.addresses = addresses, .queue_pairs = options.queue_pairs};
  listen.token.fill(0x5a);
  absl::StatusOr<std::unique_ptr<RdmaTarget>> end = ListenRdma(&target, listen);
  if (!end.ok()) return end.status();
  absl::StatusOr<RdmaSource> link = ConnectRdma(&source, (*end)->offer(), options, deadline);
  if (!link.ok()) return link.status();
  if (absl::Status s = (*end)->AwaitSource(deadline); !s.ok()) return s;
  return RdmaPair{.target = *std::move(end), .source = std::move(link->link)};
}

}  // namespace presync
