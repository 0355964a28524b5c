#include "tools/presyncd/config.h"

#include <toml++/toml.h>

#include <algorithm>
#include <fstream>
#include <functional>
#include <iterator>
#include <sstream>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "predictor/policy.h"
#include "tools/common/units.h"
#include "transport/rdma/rdma_options.h"

namespace presync {
namespace {

// Reads one table: each key has a setter, everything else is an error that names the keys there
// are.
class TableReader {
 public:
  using Setter = std::function<absl::Status(const toml::node&)>;

  explicit TableReader(std::string path) : path_(std::move(path)) {}

  void On(const std::string& key, Setter setter) { setters_[key] = std::move(setter); }

  void Text(const std::string& key, std::string* out) {
    On(key, [out](const toml::node& node) {
      const auto value = node.value_exact<std::string>();
      if (!value) return absl::InvalidArgumentError("must be a string in quotes");
      *out = *value;
      return absl::OkStatus();
    });
  }

  void Word(const std::string& key, std::string* out, std::vector<std::string> words) {
    On(key, [out, words = std::move(words)](const toml::node& node) {
      const auto value = node.value_exact<std::string>();
      if (!value || std::find(words.begin(), words.end(), *value) == words.end()) {
        return absl::InvalidArgumentError(
            absl::StrCat("must be one of: ", absl::StrJoin(words, ", ")));
      }
      *out = *value;
      return absl::OkStatus();
    });
  }

  void Flag(const std::string& key, bool* out) {
    On(key, [out](const toml::node& node) {
      const auto value = node.value_exact<bool>();
      if (!value) return absl::InvalidArgumentError("must be true or false");
      *out = *value;
      return absl::OkStatus();
    });
  }

  void Number(const std::string& key, uint32_t* out, int64_t most) {
    On(key, [out, most](const toml::node& node) {
      const auto number = node.value_exact<int64_t>();
      if (!number || *number < 1 || *number > most) {
        return absl::InvalidArgumentError(absl::StrCat("must be a number from 1 to ", most));
      }
      *out = static_cast<uint32_t>(*number);
      return absl::OkStatus();
    });
  }

  void Texts(const std::string& key, std::vector<std::string>* out, size_t most) {
    On(key, [out, most](const toml::node& node) {
      const absl::Status wrong = absl::InvalidArgumentError(
          absl::StrCat("must be an array of at most ", most, " strings"));
      const toml::array* array = node.as_array();
      if (array == nullptr || array->size() > most) return wrong;
      for (const toml::node& element : *array) {
        const auto text = element.value_exact<std::string>();
        if (!text) return wrong;
        out->push_back(*text);
      }
      return absl::OkStatus();
    });
  }

  template <typename T>
  void Parsed(const std::string& key, T* out, absl::StatusOr<T> (*parse)(absl::string_view)) {
    On(key, [out, parse](const toml::node& node) -> absl::Status {
      const auto text = node.value_exact<std::string>();
      if (!text) return absl::InvalidArgumentError("must be a string in quotes");
      absl::StatusOr<T> value = parse(*text);
      if (!value.ok()) return value.status();
      *out = *value;
      return absl::OkStatus();
    });
  }

  absl::Status Read(const toml::table& table) const {
    for (const auto& [key, node] : table) {
      const std::string name(key.str());
      const auto it = setters_.find(name);
      absl::Status status;
      if (it == setters_.end()) {
        std::vector<std::string> known;
        for (const auto& [known_key, setter] : setters_) known.push_back(known_key);
        status = absl::InvalidArgumentError(
            absl::StrCat("no such key; there are: ", absl::StrJoin(known, ", ")));
      } else {
        status = it->second(node);
      }
      if (!status.ok()) {
        return absl::InvalidArgumentError(
            absl::StrCat(path_, ":", node.source().begin.line, ": ", name, ": ", status.message()));
      }
    }
    return absl::OkStatus();
  }

 private:
  const std::string path_;
  std::map<std::string, Setter> setters_;
};

absl::Status OnTable(const toml::node& node, const TableReader& reader) {
  const toml::table* table = node.as_table();
  if (table == nullptr) return absl::InvalidArgumentError("must be a table");
  return reader.Read(*table);
}

absl::Status ReadGuest(const toml::node& node, const std::string& path, TargetGuestConfig* guest) {
  TableReader reader(path);
  reader.Text("attach", &guest->attach_qmp);
  reader.Text("user", &guest->user);
  reader.On("command", [guest](const toml::node& value) {
    const toml::array* array = value.as_array();
    if (array == nullptr) return absl::InvalidArgumentError("must be an array of strings");
    for (const toml::node& element : *array) {
      const auto text = element.value_exact<std::string>();
      if (!text) return absl::InvalidArgumentError("must be an array of strings");
      guest->command.push_back(*text);
    }
    return absl::OkStatus();
  });
  if (absl::Status s = OnTable(node, reader); !s.ok()) return s;
  if (guest->command.empty() == guest->attach_qmp.empty()) {
    return absl::InvalidArgumentError(
        "a guest needs either command = [...] or attach = \"SOCKET\"");
  }
  return absl::OkStatus();
}

absl::Status ReadDefaults(const toml::node& node, const std::string& path, Config* config) {
  TableReader reader(path);
  reader.Parsed("max_launch_time", &config->max_launch_time, &ParsePositiveDuration);
  reader.Parsed("fixed_cost", &config->fixed_cost, &ParsePositiveDuration);
  reader.Parsed("scan_interval", &config->scan_interval, &ParsePositiveDuration);
  reader.Parsed("max_bandwidth", &config->max_bandwidth, &ParseRate);
  reader.Word("compression", &config->compression, {"none", "lz4", "zstd", "auto"});
  reader.Word("dirty_log", &config->dirty_log, {"auto", "uffd-async", "uffd-handler"});
  std::vector<std::string> policies;
  for (const std::string_view name : PolicyNames()) policies.emplace_back(name);
  reader.Word("policy", &config->policy, std::move(policies));
  reader.Parsed("audit_rate", &config->audit_rate, &ParseRate);
  reader.Number("tcp_streams", &config->tcp_streams, 16);
  reader.Word("transport", &config->transport, {"auto", "rdma", "tcp"});
  reader.Number("rdma_queue_pairs", &config->rdma_queue_pairs, kMaxRdmaQueuePairs);
  reader.Texts("rdma_devices", &config->rdma_devices, kMaxRdmaDevices);
  reader.Flag("rdma_on_demand_paging", &config->rdma_on_demand_paging);
  return OnTable(node, reader);
}

absl::Status ReadLibvirt(const toml::node& node, const std::string& path, LibvirtConfig* libvirt) {
  TableReader reader(path);
  libvirt->enabled = true;
  reader.Text("uri", &libvirt->uri);
  reader.Text("memory_backing_dir", &libvirt->memory_backing_dir);
  reader.Text("socket_folder", &libvirt->socket_folder);
  reader.Text("peer_uri", &libvirt->peer_uri);
  reader.Word("migration", &libvirt->migration, {"p2p", "direct"});
  reader.Flag("unsafe", &libvirt->unsafe);
  reader.Text("plugin", &libvirt->plugin);
  return OnTable(node, reader);
}

// What a peer, or all of them, may take: in [peer.NAME] and at the top.
void ReadRules(TableReader* reader, PeerRules* rules) {
  reader->Number("max_guests", &rules->max_guests, 100000);
  reader->Parsed("max_memory", &rules->max_memory_bytes, &ParseSize);
}

absl::Status ReadPeer(const toml::node& node, const std::string& path, PeerRules* rules) {
  TableReader reader(path);
  ReadRules(&reader, rules);
  reader.Texts("guests", &rules->guests, 10000);
  reader.Texts("folders", &rules->folders, 100);
  return OnTable(node, reader);
}

absl::Status ReadPeers(const toml::node& node, const std::string& path, Config* config) {
  TableReader peers(path);
  const toml::table* table = node.as_table();
  if (table == nullptr) return absl::InvalidArgumentError("write it as [peer.NAME]");
  for (const auto& [key, value] : *table) {
    PeerRules* rules = &config->peers[std::string(key.str())];
    peers.On(std::string(key.str()),
             [&path, rules](const toml::node& n) { return ReadPeer(n, path, rules); });
  }
  return peers.Read(*table);
}

void ReadSecurity(TableReader* reader, const std::string& path, Config* config) {
  reader->Text("certificate", &config->tls.certificate);
  reader->Text("key", &config->tls.key);
  reader->Text("ca", &config->tls.ca);
  reader->Flag("trust_this_host", &config->trust_this_host);
  reader->Flag("insecure", &config->insecure);
  reader->Flag("require_encryption", &config->require_encryption);
  reader->Text("socket_group", &config->socket_group);
  reader->Number("max_connections", &config->max_connections, 10000);
  ReadRules(reader, &config->everyone);
  reader->On("peer", [&path, config](const toml::node& n) { return ReadPeers(n, path, config); });
}

absl::Status SetListen(const toml::node& node, Config* config) {
  const auto text = node.value_exact<std::string>();
  if (!text) return absl::InvalidArgumentError("must be a string in quotes");
  absl::StatusOr<HostAndPort> address = ParseHostPort(*text, kDefaultPort);
  if (!address.ok()) return address.status();
  config->listen_host = address->host;
  config->listen_port = address->port;
  return absl::OkStatus();
}

// "" is off; the port may be left out.
absl::Status SetMetricsListen(const toml::node& node, Config* config) {
  const auto text = node.value_exact<std::string>();
  if (!text) return absl::InvalidArgumentError("must be a string in quotes");
  config->metrics_listen.clear();
  if (text->empty()) return absl::OkStatus();
  absl::StatusOr<HostAndPort> address = ParseHostPort(*text, kDefaultMetricsPort);
  if (!address.ok()) return address.status();
  const bool ipv6 = address->host.find(':') != std::string::npos;
  config->metrics_listen =
      absl::StrCat(ipv6 ? "[" : "", address->host, ipv6 ? "]:" : ":", address->port);
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<Config> ParseConfig(absl::string_view text, const std::string& path) {
  toml::table parsed;
  try {  // the library's only way in Debian's build of it
    parsed = toml::parse(std::string_view(text.data(), text.size()), path);
  } catch (const toml::parse_error& error) {
    return absl::InvalidArgumentError(
        absl::StrCat(path, ":", error.source().begin.line, ": ", std::string(error.description())));
  }
  Config config;
  TableReader reader(path);
  reader.On("listen", [&](const toml::node& node) { return SetListen(node, &config); });
  reader.Text("socket", &config.socket);
  reader.On("metrics_listen",
            [&](const toml::node& node) { return SetMetricsListen(node, &config); });
  reader.Text("state_folder", &config.state_folder);
  reader.Text("run_folder", &config.run_folder);
  reader.Text("ram_folder", &config.ram_folder);
  reader.Text("qemu_user", &config.qemu.user);
  reader.Texts("qemu_groups", &config.qemu.groups, 32);
  reader.Word("log_level", &config.log_level, {"debug", "info", "warn", "error"});
  reader.Parsed("max_guest_memory", &config.max_guest_bytes, &ParseSize);
  ReadSecurity(&reader, path, &config);
  reader.Flag("rdma", &config.rdma);
  reader.Texts("rdma_addresses", &config.rdma_addresses, kMaxRdmaDevices);
  reader.On("defaults", [&](const toml::node& node) { return ReadDefaults(node, path, &config); });
  reader.On("libvirt",
            [&](const toml::node& node) { return ReadLibvirt(node, path, &config.libvirt); });
  reader.On("guest", [&](const toml::node& node) -> absl::Status {
    TableReader guests(path);
    const toml::table* table = node.as_table();
    if (table == nullptr) return absl::InvalidArgumentError("write it as [guest.NAME]");
    for (const auto& [key, value] : *table) {
      TargetGuestConfig* guest = &config.guests[std::string(key.str())];
      guests.On(std::string(key.str()),
                [&path, guest](const toml::node& n) { return ReadGuest(n, path, guest); });
    }
    return guests.Read(*table);
  });
  if (absl::Status s = reader.Read(parsed); !s.ok()) return s;
  // QEMUs are started in the folder /, and a path that means another file there is none.
  const std::pair<const char*, std::string> paths[] = {{"socket", config.socket},
                                                       {"state_folder", config.state_folder},
                                                       {"run_folder", config.run_folder},
                                                       {"ram_folder", config.ram_folder}};
  for (const auto& [key, value] : paths) {
    if (absl::StartsWith(value, "/")) continue;
    return absl::InvalidArgumentError(
        absl::StrCat(path, ": ", key, ": '", value, "' must be an absolute path"));
  }
  size_t started = 0;
  for (const auto& [name, guest] : config.guests) {
    started += guest.command.empty() ? 0 : 1;
    const absl::Status good = CheckGuestConfig(name, guest, GuestsFolder(config));
    if (good.ok()) continue;
    return absl::InvalidArgumentError(
        absl::StrCat(path, ": [guest.\"", name, "\"]: ", good.message()));
  }
  if (absl::Status s = CheckQemuUsers(config.qemu, started); !s.ok()) {
    return absl::InvalidArgumentError(absl::StrCat(path, ": ", s.message()));
  }
  if (absl::Status s = CheckSecurity(config); !s.ok()) {
    return absl::InvalidArgumentError(absl::StrCat(path, ": ", s.message()));
  }
  return config;
}

absl::Status CheckSecurity(const Config& config) {
  const TlsFiles& tls = config.tls;
  const bool any = !tls.certificate.empty() || !tls.key.empty() || !tls.ca.empty();
  const bool all = !tls.certificate.empty() && !tls.key.empty() && !tls.ca.empty();
  if (any && !all) {
    return absl::InvalidArgumentError("certificate, key and ca belong together: set all or none");
  }
  if (any && (config.insecure || config.trust_this_host)) {
    return absl::InvalidArgumentError(
        absl::StrCat(config.insecure ? "insecure" : "trust_this_host",
                     " and certificates contradict each other: with certificates nothing goes "
                     "without them"));
  }
  if (!any && config.require_encryption) {
    return absl::InvalidArgumentError(
        "require_encryption needs certificate, key and ca: without them nothing is encrypted");
  }
  if (!any && !config.peers.empty()) {
    return absl::InvalidArgumentError(
        "[peer.NAME] needs certificate, key and ca: without them nobody has a name");
  }
  return absl::OkStatus();
}

std::vector<std::string> ConfigNotes(const Config& config) {
  std::vector<std::string> notes;
  if (config.tls.certificate.empty() && config.insecure) {
    notes.emplace_back(
        "insecure: nothing is encrypted, and anybody who reaches this host may push guests here");
  } else if (config.tls.certificate.empty() && config.trust_this_host) {
    notes.emplace_back(
        "trust_this_host: any user of this host, and a guest with user-mode networking, may push "
        "guests here");
  } else if (config.tls.certificate.empty()) {
    notes.emplace_back(
        "no certificates: no guest can come or go until certificate, key and ca are set "
        "(docs/security.md)");
  }
  for (const auto& [name, rules] : config.peers) {
    if (!rules.guests.empty()) continue;
    notes.push_back(absl::StrCat("[peer.\"", name, "\"] names no guests, so ", name,
                                 " may push every guest that is configured here",
                                 config.libvirt.enabled ? ", and every domain of libvirt's" : "",
                                 "; to name them: guests = [\"web-*\"]"));
  }
  return notes;
}

absl::StatusOr<Config> LoadConfig(const std::string& path) {
  std::ifstream in(path);
  if (!in) return absl::NotFoundError(absl::StrCat("can't read the configuration ", path));
  const std::string text((std::istreambuf_iterator<char>(in)), std::istreambuf_iterator<char>());
  return ParseConfig(text, path);
}

}  // namespace presync
