// presyncd's configuration: one TOML file. docs/configuration.md describes every key.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "qemu-glue/qemu_target_host.h"
#include "qemu-glue/qemu_user.h"
#include "transport/sync/peer_rules.h"
#include "transport/tls/tls_identity.h"

namespace presync {

inline constexpr uint16_t kDefaultPort = 7350;
inline constexpr uint16_t kDefaultMetricsPort = 7352;
inline constexpr char kDefaultConfigPath[] = "/etc/presync/presyncd.toml";
inline constexpr char kDefaultSocketPath[] = "/run/presync/presyncd.sock";

// [libvirt]: guests that libvirt manages. docs/libvirt.md.
struct LibvirtConfig {
  bool enabled = false;  // the table is there
  std::string uri = "qemu:///system";
  std::string memory_backing_dir;  // empty: as in libvirt's qemu.conf
  std::string socket_folder = "/run/presync/libvirt";
  std::string peer_uri = "qemu+tls://{host}/system";  // {host}: as in --to
  std::string migration = "p2p";                      // or "direct"
  bool unsafe = false;
  std::string plugin = "/usr/lib/x86_64-linux-gnu/qemu/presync_glue.so";
};

struct Config {
  std::string listen_host = "127.0.0.1";  // until an operator opens it
  uint16_t listen_port = kDefaultPort;
  std::string socket = kDefaultSocketPath;
  std::string state_folder = "/var/lib/presync";  // handover records: must survive a reboot
  std::string run_folder = "/run/presync";
  std::string ram_folder = "/dev/shm/presync";
  std::string socket_group;  // whose members may command presyncd, besides root and its own user
  std::string log_level = "info";
  QemuUserConfig qemu;  // whom QEMUs run as that presyncd starts
  uint64_t max_guest_bytes = 0;
  std::string metrics_listen;  // HOST:PORT of /metrics; empty: none
  // Who other hosts are, and what they may: docs/security.md.
  TlsFiles tls;                     // all empty: no certificates
  bool trust_this_host = false;     // without certificates, talk to any process of this host
  bool insecure = false;            // without certificates, talk to other hosts all the same
  bool require_encryption = false;  // no RDMA
  std::map<std::string, PeerRules> peers;
  PeerRules everyone = {.max_guests = 64};  // all peers together
  uint32_t max_connections = 256;

  bool rdma = true;                         // whether guests may come by RDMA
  std::vector<std::string> rdma_addresses;  // empty: where the control connection arrives

  // What `presync start` uses where its caller says nothing.
  absl::Duration max_launch_time = absl::Milliseconds(100);
  absl::Duration fixed_cost = absl::Milliseconds(60);
  absl::Duration scan_interval = absl::Milliseconds(100);
  uint64_t max_bandwidth = 0;
  std::string transport = "auto";
  uint32_t rdma_queue_pairs = 4;
  std::vector<std::string> rdma_devices;  // empty: any
  bool rdma_on_demand_paging = false;
  uint32_t tcp_streams = 4;
  std::string compression = "auto";
  std::string dirty_log = "auto";
  std::string policy = "learned";
  // Guest memory that the background audit compares by hash, bytes a second; 0: none.
  uint64_t audit_rate = 4'000'000;

  std::map<std::string, TargetGuestConfig> guests;
  LibvirtConfig libvirt;
};

// Where the sockets, logs and notes of guests that come here lie.
inline std::string GuestsFolder(const Config& config) { return config.run_folder + "/guests"; }

// INVALID_ARGUMENT with file, line and key: bad syntax, an unknown key, a value that makes no
// sense, settings that contradict each other. NOT_FOUND: no such file.
absl::StatusOr<Config> LoadConfig(const std::string& path);
// What contradicts itself in what is about security. LoadConfig and ParseConfig look already; for
// whoever changes it afterwards. INVALID_ARGUMENT.
absl::Status CheckSecurity(const Config& config);
// What is in order, and may not be what the operator has in mind: whole sentences, for --check.
std::vector<std::string> ConfigNotes(const Config& config);
absl::StatusOr<Config> ParseConfig(absl::string_view text, const std::string& path);

}  // namespace presync
