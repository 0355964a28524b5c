#include "transport/sync/dialer.h"

#include <errno.h>
#include <sys/socket.h>

#include <cstring>
#include <utility>

#include "absl/strings/str_cat.h"
#include "transport/tcp/socket.h"

namespace presync {

TcpDialer::TcpDialer(std::string host, uint16_t port)
    : host_(std::move(host)), port_(port), peer_(FormatHostPort(host_, port_)) {}

absl::StatusOr<UniqueFd> TcpDialer::Dial(const Preamble& preamble, absl::Time deadline) {
  absl::StatusOr<UniqueFd> socket = Connect(host_, port_, deadline);
  if (!socket.ok()) return socket.status();
  // A fresh connection's buffer holds a preamble: this does not block.
  const auto bytes = EncodePreamble(preamble);
  if (::send(socket->get(), bytes.data(), bytes.size(), MSG_NOSIGNAL) !=
      static_cast<ssize_t>(bytes.size())) {
    return absl::UnavailableError(absl::StrCat("connect to ", peer_, ": ", std::strerror(errno)));
  }
  return socket;
}

}  // namespace presync
