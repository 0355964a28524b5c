// Listening, connecting and accepting with deadlines, over IPv4 and IPv6.
#pragma once

#include <cstdint>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "transport/unique_fd.h"

namespace presync {

// "10.0.0.2:7350", "[fd00::2]:7350".
std::string FormatHostPort(const std::string& host, uint16_t port);

// Listens on an address or name; "" is every address, port 0 any free one (see BoundPort).
// NOT_FOUND: no such name. Else the system's answer: ALREADY_EXISTS (in use), PERMISSION_DENIED,
// ...
absl::StatusOr<UniqueFd> Listen(const std::string& address, uint16_t port);

// The port a socket is bound to.
absl::StatusOr<uint16_t> BoundPort(int socket);

// Blocks for the next connection. DEADLINE_EXCEEDED: none came in time. What it returns blocks.
absl::StatusOr<UniqueFd> Accept(int listener, absl::Time deadline);

// Who is at the other end of a connected socket: "10.0.0.2:43210", or "unknown".
std::string PeerName(int socket);

// The same without the port: "10.0.0.2"; "unknown".
std::string PeerAddress(int socket);

// Whether the other end is a process of this network namespace: it has a loopback address, one that
// this namespace has itself, or is no IP socket at all. False when in doubt.
bool IsPeerOnThisHost(int socket);

// Tries every address of `host` in turn until `deadline`. Looking up a name is the resolver's, and
// may take longer. NOT_FOUND: no such name. UNAVAILABLE: refused or unreachable. DEADLINE_EXCEEDED:
// no answer. What it returns blocks.
absl::StatusOr<UniqueFd> Connect(const std::string& host, uint16_t port, absl::Time deadline);

}  // namespace presync
