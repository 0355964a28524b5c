// How the source reaches the target's presyncd.
#pragma once

#include <memory>
#include <string>
#include <utility>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "transport/tls/connection.h"
#include "transport/tls/tls_identity.h"
#include "transport/wire/preamble.h"

namespace presync {

// Thread-safe.
class Dialer {
 public:
  virtual ~Dialer() = default;

  // A new connection with its preamble sent. UNAVAILABLE or DEADLINE_EXCEEDED, with the host's name
  // and what to look at; INVALID_ARGUMENT: no such host; UNAUTHENTICATED: the other side is not who
  // it should be; PERMISSION_DENIED: it may be spoken to within TLS only.
  virtual absl::StatusOr<Connection> Dial(const Preamble& preamble, absl::Time deadline) = 0;

  // For logs and error texts: "10.0.0.2:7350".
  virtual const std::string& peer() const = 0;
};

// Who may be spoken to without TLS: nothing is encrypted then, and nobody knows who is there.
enum class PlainPeers {
  kNobody,
  kThisHost,  // loopback, and addresses of this network namespace: any process of any user
  kAnyone,
};

// How connections are secured. With an identity every connection is within TLS, and `plain` does
// not count.
struct PeerSecurity {
  std::shared_ptr<const TlsIdentity> identity;  // null: plain
  PlainPeers plain = PlainPeers::kThisHost;
};

// Whether the other end of `socket`, which is not within TLS, is one of `plain`. PERMISSION_DENIED:
// who it is, and what to do.
absl::Status CheckPlain(PlainPeers plain, int socket);

// Dials TCP. `port` as in the operator's HOST[:PORT].
class TcpDialer final : public Dialer {
 public:
  TcpDialer(std::string host, uint16_t port, PeerSecurity security = {});
  absl::StatusOr<Connection> Dial(const Preamble& preamble, absl::Time deadline) override;
  const std::string& peer() const override { return peer_; }

 private:
  const std::string host_;
  const uint16_t port_;
  const std::string peer_;
  const PeerSecurity security_;
};

}  // namespace presync
