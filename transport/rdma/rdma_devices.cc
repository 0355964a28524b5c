#include "transport/rdma/rdma_devices.h"

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <system_error>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"

namespace presync {
namespace {

namespace fs = std::filesystem;

// A sysfs file's one line; empty if it can't be read.
std::string ReadLine(const fs::path& path) {
  std::ifstream in(path);
  std::string line;
  std::getline(in, line);
  return line;
}

std::vector<std::string> Names(const fs::path& folder) {
  std::vector<std::string> names;
  std::error_code error;
  for (const auto& entry : fs::directory_iterator(folder, error)) {
    names.push_back(entry.path().filename().string());
  }
  std::sort(names.begin(), names.end());
  return names;
}

RdmaPort ReadPort(const fs::path& folder, uint32_t number) {
  RdmaPort port = {.number = number};
  port.state = ReadLine(folder / "state");  // "4: ACTIVE"
  if (const size_t at = port.state.find(": "); at != std::string::npos) {
    port.state = port.state.substr(at + 2);
  }
  port.active = port.state == "ACTIVE";
  port.link_layer = ReadLine(folder / "link_layer");
  port.rate = ReadLine(folder / "rate");
  port.netdev = ReadLine(folder / "gid_attrs" / "ndevs" / "0");
  return port;
}

}  // namespace

std::vector<RdmaDevice> ListRdmaDevices(const std::string& sysfs) {
  std::vector<RdmaDevice> devices;
  for (const std::string& name : Names(sysfs)) {
    const fs::path folder = fs::path(sysfs) / name;
    RdmaDevice device = {.name = name};
    device.iwarp = ReadLine(folder / "node_type").find("RNIC") != std::string::npos;
    for (const std::string& port : Names(folder / "ports")) {
      const uint32_t number = static_cast<uint32_t>(std::atoi(port.c_str()));
      if (number > 0) device.ports.push_back(ReadPort(folder / "ports" / port, number));
    }
    devices.push_back(std::move(device));
  }
  return devices;
}

absl::Status CheckRdmaDevices(const std::vector<std::string>& names, const std::string& sysfs) {
  const std::vector<RdmaDevice> devices = ListRdmaDevices(sysfs);
  std::vector<std::string> found;
  for (const RdmaDevice& device : devices) {
    const bool wanted =
        names.empty() || std::find(names.begin(), names.end(), device.name) != names.end();
    for (const RdmaPort& port : device.ports) {
      if (wanted && port.active) return absl::OkStatus();
      found.push_back(absl::StrCat(device.name, " (port ", port.number, " ", port.state, ")"));
    }
  }
  return absl::UnimplementedError(absl::StrCat(
      "no usable RDMA device: looked in ", sysfs, " for ",
      names.empty() ? std::string("any") : absl::StrJoin(names, ", "), " with an active port; ",
      found.empty() ? std::string("there is none")
                    : absl::StrCat("found ", absl::StrJoin(found, ", "))));
}

uint64_t ReadCongestionMarks(const std::string& device, uint32_t port, const std::string& sysfs) {
  // What a sender's own device counts: mlx5, irdma, bnxt_re. (np_* and ECN marks received count at
  // the other host.)
  static constexpr const char* kCounters[] = {"rp_cnp_handled", "cnpHandled", "rx_cnp_pkts"};
  const fs::path folder = fs::path(sysfs) / device / "ports" / std::to_string(port) / "hw_counters";
  uint64_t sum = 0;
  for (const char* counter : kCounters) {
    std::ifstream in(folder / counter);
    uint64_t value = 0;
    if (in >> value) sum += value;
  }
  return sum;
}

}  // namespace presync
