// RDMA devices that tests may use, and links over them.
//
// A machine without one skips these tests, and says so; where PRESYNC_RDMA_REQUIRED is set in the
// environment (the lab's RDMA machine) that is a failure.
#pragma once

#include <memory>
#include <ostream>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "transport/memory.h"
#include "transport/rdma/rdma_link.h"

namespace presync {

struct TestDevice {
  std::string name;     // "rxe0"
  std::string address;  // of its network device
};

inline void PrintTo(const TestDevice& device, std::ostream* out) { *out << device.name; }

// Devices that have an IPv4 address which they can be found by; looked for once.
const std::vector<TestDevice>& TestDevices();

bool RdmaIsRequired();

struct RdmaPair {
  std::unique_ptr<RdmaTarget> target;
  std::unique_ptr<SourceLink> source;
};

// Emulation under load is slow: tests that are not about stalls wait this long.
inline constexpr absl::Duration kTestStall = absl::Seconds(30);

RdmaSourceOptions TestOptions(uint32_t queue_pairs);

// The device's network device is down while this lives. Only where RdmaIsRequired: it needs root,
// and a machine of its own.
class PathCut {
 public:
  explicit PathCut(const TestDevice& device);
  ~PathCut();

 private:
  std::string netdev_;
};

// Both ends in this process, over these addresses.
absl::StatusOr<RdmaPair> ConnectPair(const std::vector<std::string>& addresses,
                                     const RdmaSourceOptions& options, const GuestMemory& source,
                                     const GuestMemory& target);

}  // namespace presync

// First line of a test that needs a device.
#define PRESYNC_NEEDS_RDMA()                                                                 \
  do {                                                                                       \
    if (::presync::TestDevices().empty()) {                                                  \
      if (::presync::RdmaIsRequired()) FAIL() << "no RDMA device, and one is required here"; \
      GTEST_SKIP() << "no RDMA device with an IPv4 address on this machine";                 \
    }                                                                                        \
  } while (false)
