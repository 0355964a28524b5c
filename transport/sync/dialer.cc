#include "transport/sync/dialer.h"

#include <utility>

#include "absl/strings/str_cat.h"
#include "transport/tcp/socket.h"

namespace presync {

absl::Status CheckPlain(PlainPeers plain, int socket) {
  if (plain == PlainPeers::kAnyone) return absl::OkStatus();
  const bool is_here = IsPeerOnThisHost(socket);
  if (is_here && plain == PlainPeers::kThisHost) return absl::OkStatus();
  return absl::PermissionDeniedError(absl::StrCat(
      is_here ? "it is a process of this host, any user's, or a guest with user-mode networking"
              : "it is another host",
      ", and this presyncd has no certificates: set certificate, key and ca (docs/security.md), or "
      "allow it all the same with ",
      is_here ? "trust_this_host" : "insecure", " = true"));
}

TcpDialer::TcpDialer(std::string host, uint16_t port, PeerSecurity security)
    : host_(std::move(host)),
      port_(port),
      peer_(FormatHostPort(host_, port_)),
      security_(std::move(security)) {}

absl::StatusOr<Connection> TcpDialer::Dial(const Preamble& preamble, absl::Time deadline) {
  absl::StatusOr<UniqueFd> socket = Connect(host_, port_, deadline);
  if (!socket.ok()) return socket.status();
  Connection connection(*std::move(socket));
  if (security_.identity != nullptr) {
    absl::StatusOr<std::unique_ptr<TlsSession>> tls =
        TlsSession::Connect(connection.fd(), *security_.identity, host_, deadline);
    if (!tls.ok()) {
      return absl::Status(tls.status().code(),
                          absl::StrCat("connect to ", peer_, ": ", tls.status().message(),
                                       absl::IsUnavailable(tls.status())
                                           ? "; does its presyncd have certificates, and is it "
                                             "willing to talk to this host? See its log"
                                           : ""));
    }
    connection = Connection(connection.TakeSocket(), *std::move(tls));
  } else if (absl::Status s = CheckPlain(security_.plain, connection.fd()); !s.ok()) {
    return absl::Status(s.code(), absl::StrCat(peer_, ": ", s.message()));
  }
  const auto bytes = EncodePreamble(preamble);
  absl::Span<const char> left(reinterpret_cast<const char*>(bytes.data()), bytes.size());
  while (!left.empty()) {
    short events = 0;
    const absl::StatusOr<size_t> sent = connection.TrySend(left, &events);
    absl::Status status = sent.status();
    if (sent.ok()) left.remove_prefix(*sent);
    if (sent.ok() && *sent == 0) status = AwaitSocket(connection.fd(), events, deadline);
    if (!status.ok()) {
      return absl::Status(status.code(),
                          absl::StrCat("connect to ", peer_, ": ", status.message()));
    }
  }
  return connection;
}

}  // namespace presync
