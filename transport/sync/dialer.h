// How the source reaches the target's presyncd.
#pragma once

#include <string>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "transport/unique_fd.h"
#include "transport/wire/preamble.h"

namespace presync {

// Thread-safe.
class Dialer {
 public:
  virtual ~Dialer() = default;

  // A new connection with its preamble sent. UNAVAILABLE or DEADLINE_EXCEEDED, with the host's name
  // and what to look at; INVALID_ARGUMENT: no such host.
  virtual absl::StatusOr<UniqueFd> Dial(const Preamble& preamble, absl::Time deadline) = 0;

  // For logs and error texts: "10.0.0.2:7350".
  virtual const std::string& peer() const = 0;
};

// Dials TCP. `port` as in the operator's HOST[:PORT].
class TcpDialer final : public Dialer {
 public:
  TcpDialer(std::string host, uint16_t port);
  absl::StatusOr<UniqueFd> Dial(const Preamble& preamble, absl::Time deadline) override;
  const std::string& peer() const override { return peer_; }

 private:
  const std::string host_;
  const uint16_t port_;
  const std::string peer_;
};

}  // namespace presync
