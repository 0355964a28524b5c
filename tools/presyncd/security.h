// What the configuration says about certificates and peers, made ready for the sessions, and told
// in every status.
#pragma once

#include <memory>
#include <nlohmann/json.hpp>

#include "absl/status/statusor.h"
#include "tools/presyncd/config.h"
#include "transport/sync/dialer.h"
#include "transport/sync/target_service.h"

namespace presync {

// Thread-safe.
class Security {
 public:
  // Reads the certificates, if there are any. Errors: TlsIdentity's.
  static absl::StatusOr<std::unique_ptr<Security>> Create(const Config& config);

  // For dialling.
  const PeerSecurity& peers() const { return peers_; }

  // For what comes in.
  void Apply(TargetServiceOptions* options) const;

  // Reads the certificates again; connections that there are keep theirs. On an error the old ones
  // stay. Ok without certificates.
  absl::Status Reload();

  // "security" of a status: docs/protocol.md, "status".
  nlohmann::json ToJson() const;

 private:
  Security(const Config& config, std::shared_ptr<TlsIdentity> identity);
  std::string Warning() const;

  const std::shared_ptr<TlsIdentity> identity_;  // null: none
  const PeerSecurity peers_;
  const bool require_encryption_;
  const std::map<std::string, PeerRules> rules_;
  const PeerRules everyone_;
  const uint32_t max_connections_;
};

}  // namespace presync
