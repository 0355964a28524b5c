#include "transport/sync/admission.h"

#include <errno.h>
#include <poll.h>
#include <sys/socket.h>

#include <algorithm>
#include <cstring>
#include <utility>

#include "absl/strings/str_cat.h"
#include "transport/clock.h"
#include "transport/tcp/socket.h"

namespace presync {
namespace {

constexpr absl::Duration kLastWord = absl::Milliseconds(500);
constexpr char kTlsHandshake = 22;  // RFC 8446, 5.1; presync's own preamble begins with 'P'

absl::Status Slow() { return absl::DeadlineExceededError("it did not say what it is for"); }

// The first byte, which stays to be read: TLS or not.
absl::StatusOr<char> FirstByte(int fd, absl::Time deadline) {
  while (true) {
    char byte = 0;
    const ssize_t n = ::recv(fd, &byte, 1, MSG_DONTWAIT | MSG_PEEK);
    if (n == 1) return byte;
    if (n == 0) return absl::UnavailableError("it was closed before it said what it is for");
    if (errno == EINTR) continue;
    if (errno != EAGAIN) return absl::UnavailableError(std::strerror(errno));
    if (absl::Status s = AwaitSocket(fd, POLLIN, deadline); !s.ok()) return Slow();
  }
}

absl::StatusOr<Connection> Secure(UniqueFd socket, const TlsIdentity& identity,
                                  absl::Time deadline) {
  absl::StatusOr<std::unique_ptr<TlsSession>> tls =
      TlsSession::Accept(socket.get(), identity, deadline);
  if (tls.ok()) return Connection(std::move(socket), *std::move(tls));
  // The alert that says why must arrive before the connection is reset.
  if (!absl::IsDeadlineExceeded(tls.status())) CloseGently(std::move(socket), kLastWord);
  return tls.status();
}

absl::StatusOr<Connection> Take(UniqueFd socket, const AdmissionRules& rules, absl::Time deadline) {
  const absl::StatusOr<char> first = FirstByte(socket.get(), deadline);
  if (!first.ok()) return first.status();
  const PeerSecurity& security = rules.security;
  if (*first == kTlsHandshake) {
    if (security.identity != nullptr)
      return Secure(std::move(socket), *security.identity, deadline);
    return absl::PermissionDeniedError(
        "it speaks TLS, and this host has no certificates: set certificate, key and ca");
  }
  if (security.identity != nullptr && !rules.plain_beside_tls) {
    return absl::UnauthenticatedError(
        "it does not speak TLS, without which nobody is known here; a presyncd needs certificates "
        "of the same authority");
  }
  if (security.identity == nullptr) {
    if (absl::Status s = CheckPlain(security.plain, socket.get()); !s.ok()) return s;
  }
  return Connection(std::move(socket));
}

absl::StatusOr<Preamble> ReadPreamble(Connection* connection, absl::Time deadline) {
  char bytes[kPreambleBytes];
  for (size_t have = 0; have < sizeof(bytes);) {
    short events = 0;
    const absl::StatusOr<size_t> n =
        connection->TryReceive({bytes + have, sizeof(bytes) - have}, &events);
    if (absl::IsUnavailable(n.status())) {
      return absl::UnavailableError("it was closed before it said what it is for");
    }
    if (!n.ok()) return n.status();
    have += *n;
    if (*n == 0 && !AwaitSocket(connection->fd(), events, deadline).ok()) return Slow();
    if (MonotonicNow() >= deadline) return Slow();  // who trickles is slow, too
  }
  return DecodePreamble({reinterpret_cast<const uint8_t*>(bytes), sizeof(bytes)});
}

}  // namespace

absl::StatusOr<Admitted> Admit(UniqueFd socket, const AdmissionRules& rules, absl::Time deadline) {
  absl::StatusOr<Connection> connection = Take(std::move(socket), rules, deadline);
  if (!connection.ok()) return connection.status();
  const absl::StatusOr<Preamble> preamble = ReadPreamble(&*connection, deadline);
  if (!preamble.ok()) return preamble.status();
  return Admitted{*std::move(connection), *preamble};
}

}  // namespace presync
