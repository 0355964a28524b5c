// What presyncd does about guests that libvirt manages: finds them, and answers libvirt's hook.
#pragma once

#include <nlohmann/json.hpp>
#include <string>

#include "absl/status/statusor.h"
#include "qemu-glue/libvirt/libvirt_target_host.h"
#include "qemu-glue/open_guest.h"
#include "tools/presyncd/config.h"
#include "transport/sync/target_service.h"

namespace presync {

// A domain that runs here and that can be kept in sync, as far as its XML tells.
struct Domain {
  std::string name;
  std::string uuid;
  std::string qmp_path;
  std::string glue_path;
  std::string stream_path;
};

// FAILED_PRECONDITION: it does not run, or lacks something: all of it, each with its remedy. Else
// as LibvirtClient; FAILED_PRECONDITION too if this host's configuration has no [libvirt].
absl::StatusOr<Domain> FindDomain(const LibvirtConfig& config, const std::string& name);

// Makes `domain`'s guest as a source that launches to `peer_host`.
MakeSourceGuest MakeDomainGuest(const LibvirtConfig& config, const Domain& domain,
                                const std::string& peer_host);

// Null without [libvirt]. Errors as LibvirtTargetHost::Create.
absl::StatusOr<std::unique_ptr<LibvirtTargetHost>> MakeLibvirtHost(const Config& config);

// The request "libvirt-hook" (docs/protocol.md). `host` may be null. Blocks for as long as the
// source takes to get ready.
absl::StatusOr<nlohmann::json> AnswerHook(const nlohmann::json& request, LibvirtTargetHost* host,
                                          TargetService* service);

// The request "libvirt": what `presync libvirt` and `presync doctor` have to know.
absl::StatusOr<nlohmann::json> DescribeLibvirt(const LibvirtConfig& config);

}  // namespace presync
