// The first moments of a connection that came in: who it is, and what it is for.
#pragma once

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "transport/sync/dialer.h"
#include "transport/tls/connection.h"
#include "transport/wire/preamble.h"

namespace presync {

struct AdmissionRules {
  PeerSecurity security;
  bool plain_beside_tls = false;  // with an identity, take plain ones too: for benchmarks
};

struct Admitted {
  Connection connection;
  Preamble preamble;
};

// Shakes hands, if it is TLS, and reads the preamble. Blocks until then, at most until `deadline`
// (and half a second more for a last word to somebody who is refused). UNAUTHENTICATED,
// PERMISSION_DENIED: not somebody to talk to; INVALID_ARGUMENT: does not speak presync's protocol;
// DEADLINE_EXCEEDED, UNAVAILABLE: too slow, gone. The texts hold no numbers that differ from one to
// the next.
absl::StatusOr<Admitted> Admit(UniqueFd socket, const AdmissionRules& rules, absl::Time deadline);

}  // namespace presync
