#include "tools/presyncd/security.h"

#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"

namespace presync {
namespace {

// From when on a status says that a certificate runs out.
constexpr absl::Duration kExpiresSoon = absl::Hours(30 * 24);

PlainPeers PlainOf(const Config& config) {
  if (config.insecure) return PlainPeers::kAnyone;
  return config.trust_this_host ? PlainPeers::kThisHost : PlainPeers::kNobody;
}

const char* ModeOf(PlainPeers plain) {
  switch (plain) {
    case PlainPeers::kNobody:
      return "no-peers";
    case PlainPeers::kThisHost:
      return "this-host-only";
    case PlainPeers::kAnyone:
      return "insecure";
  }
  return "";
}

}  // namespace

absl::StatusOr<std::unique_ptr<Security>> Security::Create(const Config& config) {
  std::shared_ptr<TlsIdentity> identity;
  if (!config.tls.certificate.empty()) {
    absl::StatusOr<std::unique_ptr<TlsIdentity>> loaded = TlsIdentity::Load(config.tls);
    if (!loaded.ok()) return loaded.status();
    identity = *std::move(loaded);
  }
  return std::unique_ptr<Security>(new Security(config, std::move(identity)));
}

Security::Security(const Config& config, std::shared_ptr<TlsIdentity> identity)
    : identity_(std::move(identity)),
      peers_({identity_, PlainOf(config)}),
      require_encryption_(config.require_encryption),
      rules_(config.peers),
      everyone_(config.everyone),
      max_connections_(config.max_connections) {}

void Security::Apply(TargetServiceOptions* options) const {
  options->admission.security = peers_;
  options->require_encryption = require_encryption_;
  options->peers = rules_;
  options->everyone = everyone_;
  options->max_connections = max_connections_;
}

absl::Status Security::Reload() {
  return identity_ == nullptr ? absl::OkStatus() : identity_->Reload();
}

std::string Security::Warning() const {
  if (identity_ == nullptr && peers_.plain == PlainPeers::kAnyone) {
    return "INSECURE: other hosts need no certificate, and nothing is encrypted (--insecure)";
  }
  if (identity_ == nullptr && peers_.plain == PlainPeers::kThisHost) {
    return "any user of this host, and a guest with user-mode networking, may push guests here "
           "(trust_this_host)";
  }
  if (identity_ == nullptr) return "";
  const absl::Duration left = identity_->expires() - absl::Now();
  if (left > kExpiresSoon) return "";
  const std::string when =
      absl::FormatTime("%Y-%m-%d %H:%M UTC", identity_->expires(), absl::UTCTimeZone());
  return absl::StrCat("this host's certificate ",
                      left > absl::ZeroDuration() ? "runs out on " : "ran out on ", when,
                      ": replace it, and reload presyncd (systemctl reload presyncd)");
}

nlohmann::json Security::ToJson() const {
  nlohmann::json json = {{"mode", identity_ != nullptr ? "tls" : ModeOf(peers_.plain)},
                         {"require_encryption", require_encryption_},
                         {"warning", Warning()}};
  if (identity_ != nullptr) {
    json["certificate"] = identity_->name();
    json["expires"] =
        absl::FormatTime(absl::RFC3339_sec, identity_->expires(), absl::UTCTimeZone());
  }
  return json;
}

}  // namespace presync
