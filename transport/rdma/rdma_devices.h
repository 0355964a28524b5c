// The RDMA devices of this host, as the kernel shows them in sysfs. Needs no RDMA library.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/status.h"

namespace presync {

inline constexpr char kRdmaSysfs[] = "/sys/class/infiniband";

struct RdmaPort {
  uint32_t number = 1;
  bool active = false;
  std::string state;       // the kernel's words: "ACTIVE", "DOWN"
  std::string link_layer;  // "InfiniBand", "Ethernet"
  std::string rate;        // "100 Gb/sec (4X EDR)"
  std::string netdev;      // empty if it has none, or it is not said
};

struct RdmaDevice {
  std::string name;
  bool iwarp = false;
  std::vector<RdmaPort> ports;
};

// Ascending by name; none if the folder is not there.
std::vector<RdmaDevice> ListRdmaDevices(const std::string& sysfs = kRdmaSysfs);

// Whether this host has a device with a working port, one of `names` unless that is empty.
// UNIMPLEMENTED: it has not; the text says what was looked for, and what was found instead.
absl::Status CheckRdmaDevices(const std::vector<std::string>& names,
                              const std::string& sysfs = kRdmaSysfs);

// Sum of the counters of a port that count congestion notifications which this host's sending
// caused (rp_cnp_handled of mlx5, and others' equivalents). 0 where the device has none.
uint64_t ReadCongestionMarks(const std::string& device, uint32_t port,
                             const std::string& sysfs = kRdmaSysfs);

}  // namespace presync
