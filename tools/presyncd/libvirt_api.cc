#include "tools/presyncd/libvirt_api.h"

#include <spdlog/spdlog.h>

#include <memory>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_replace.h"
#include "qemu-glue/libvirt/domain_xml.h"
#include "qemu-glue/libvirt/libvirt_client.h"
#include "qemu-glue/libvirt/libvirt_source_guest.h"
#include "tools/common/local_api.h"
#include "transport/clock.h"

namespace presync {
namespace {

using Json = nlohmann::json;

// libvirt waits for its hook, and whoever migrates waits for libvirt.
constexpr absl::Duration kSourceTimeout = absl::Seconds(15);

std::string MemoryBackingDir(const LibvirtConfig& config) {
  return config.memory_backing_dir.empty() ? ReadMemoryBackingDir() : config.memory_backing_dir;
}

absl::Status CheckConfigured(const LibvirtConfig& config) {
  if (config.enabled) return absl::OkStatus();
  return absl::FailedPreconditionError(
      "this host's presyncd.toml has no [libvirt]: add the line, and restart presyncd");
}

Json Unknown() { return Json::object({{"known", false}}); }

// Whether a session that is alive mirrors the guest here.
absl::Status CheckMirrored(const TargetService& service, const std::string& guest) {
  for (const TargetStatus& status : service.status()) {
    if (status.guest != guest) continue;
    if (status.state == "mirroring") return absl::OkStatus();
    return absl::FailedPreconditionError(
        absl::StrCat("presync mirrors ", guest, " here, but its sync is '", status.state,
                     "': wait until presync status on its source says syncing, or end it there "
                     "with presync stop ",
                     guest, ", and migrate it without presync"));
  }
  return absl::FailedPreconditionError(absl::StrCat(guest, " is not mirrored here any more"));
}

absl::StatusOr<Json> OnMigrate(const std::string& uuid, LibvirtTargetHost* host,
                               TargetService* service) {
  absl::StatusOr<std::string> guest = host->OnMigrate(uuid);
  if (!guest.ok()) return guest.status();
  if (absl::Status s = CheckMirrored(*service, *guest); !s.ok()) {
    host->OnEnded(uuid).IgnoreError();
    return s;
  }
  spdlog::info("{}: libvirt is about to bring it here", *guest);
  return Json::object({{"known", true}});
}

absl::StatusOr<Json> OnStart(const std::string& uuid, LibvirtTargetHost* host,
                             TargetService* service) {
  absl::StatusOr<std::vector<MirroredFile>> files = host->OnStart(uuid);
  if (!files.ok()) return files.status();
  absl::StatusOr<std::string> guest = host->OnMigrate(uuid);
  if (!guest.ok()) return guest.status();
  if (absl::Status s = service->AnnounceLaunch(*guest, MonotonicNow() + kSourceTimeout); !s.ok()) {
    return s;
  }
  Json answer = {{"known", true}, {"folder", host->domains_folder()}, {"files", Json::array()}};
  for (const MirroredFile& file : *files) {
    answer["files"].push_back({{"path", file.path},
                               {"name", file.region},
                               {"device", file.device},
                               {"inode", file.inode}});
  }
  return answer;
}

absl::StatusOr<Json> OnEnded(const std::string& uuid, LibvirtTargetHost* host,
                             TargetService* service) {
  absl::StatusOr<std::string> guest = host->OnEnded(uuid);
  if (!guest.ok()) return guest.status();
  service->RetractLaunch(*guest, "its QEMU on the target has ended");
  spdlog::info("{}: libvirt has ended what waited for it", *guest);
  return Json::object({{"known", true}});
}

}  // namespace

absl::StatusOr<Domain> FindDomain(const LibvirtConfig& config, const std::string& name) {
  if (absl::Status s = CheckConfigured(config); !s.ok()) return s;
  const LibvirtClient libvirt(config.uri);
  absl::StatusOr<DomainInfo> info = libvirt.Find(name);
  if (!info.ok()) return info.status();
  if (!info->active) {
    return absl::FailedPreconditionError(absl::StrCat(
        "the domain ", info->name, " does not run here: start it (virsh start ", info->name, ")"));
  }
  const DomainSockets sockets = SocketsIn(info->xml, config.socket_folder, info->uuid);
  absl::StatusOr<std::vector<Problem>> problems = CheckDomain(info->xml, sockets);
  if (!problems.ok()) return problems.status();
  std::vector<std::string> texts;
  for (const Problem& problem : *problems) {
    texts.push_back(absl::StrCat(problem.what, " -> ", problem.remedy));
  }
  if (absl::Status s = CheckMemoryFolder(MemoryBackingDir(config)); !s.ok()) {
    texts.emplace_back(s.message());
  }
  if (!texts.empty()) {
    return absl::FailedPreconditionError(absl::StrCat(
        "the domain ", info->name, " can't be kept in sync: ", absl::StrJoin(texts, "; ")));
  }
  return Domain{.name = info->name,
                .uuid = info->uuid,
                .qmp_path = sockets.qmp,
                .glue_path = sockets.glue,
                .stream_path = sockets.stream};
}

MakeSourceGuest MakeDomainGuest(const LibvirtConfig& config, const Domain& domain,
                                const std::string& peer_host) {
  LibvirtSourceOptions options = {
      .libvirt_uri = config.uri,
      .uuid = domain.uuid,
      .stream_path = domain.stream_path,
      .move = {.peer_uri = absl::StrReplaceAll(config.peer_uri, {{"{host}", peer_host}}),
               .stream_uri = "",
               .peer_to_peer = config.migration == "p2p",
               .unsafe = config.unsafe}};
  return [options = std::move(options)](
             std::unique_ptr<QmpClient> qmp,
             absl::Time deadline) -> absl::StatusOr<std::unique_ptr<SourceGuest>> {
    return LibvirtSourceGuest::Create(std::move(qmp), options, deadline);
  };
}

absl::StatusOr<std::unique_ptr<LibvirtTargetHost>> MakeLibvirtHost(const Config& config) {
  if (!config.libvirt.enabled) return nullptr;
  return LibvirtTargetHost::Create({.uri = config.libvirt.uri,
                                    .memory_backing_dir = MemoryBackingDir(config.libvirt),
                                    .socket_folder = config.libvirt.socket_folder,
                                    .max_guest_bytes = config.max_guest_bytes});
}

absl::StatusOr<Json> AnswerHook(const Json& request, LibvirtTargetHost* host,
                                TargetService* service) {
  if (host == nullptr) return Unknown();
  const std::string operation = TextOr(request, "operation", "");
  const std::string uuid = TextOr(request, "uuid", "");
  absl::StatusOr<Json> answer =
      absl::InvalidArgumentError(absl::StrCat("libvirt's hook knows no '", operation, "'"));
  if (operation == "migrate") answer = OnMigrate(uuid, host, service);
  if (operation == "start") answer = OnStart(uuid, host, service);
  if (operation == "started") {
    const absl::Status fit = host->OnStarted(uuid);
    answer = fit.ok() ? absl::StatusOr<Json>(Json::object({{"known", true}})) : fit;
  }
  if (operation == "stopped" || operation == "release") answer = OnEnded(uuid, host, service);
  if (absl::IsNotFound(answer.status())) return Unknown();
  return answer;
}

absl::StatusOr<Json> DescribeLibvirt(const LibvirtConfig& config) {
  if (absl::Status s = CheckConfigured(config); !s.ok()) return s;
  return Json{{"uri", config.uri},
              {"memory_backing_dir", MemoryBackingDir(config)},
              {"socket_folder", config.socket_folder},
              {"peer_uri", config.peer_uri},
              {"plugin", config.plugin}};
}

}  // namespace presync
