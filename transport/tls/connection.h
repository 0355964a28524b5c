// A connected stream socket, plain or within TLS: what the control connection and the TCP link's
// streams are made of.
#pragma once

#include <cstddef>
#include <memory>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "absl/types/span.h"
#include "transport/tls/tls_session.h"
#include "transport/unique_fd.h"

namespace presync {

// Movable. One thread at a time may TrySend, one TryReceive; the rest may be called from any.
class Connection {
 public:
  Connection() = default;                                      // none; for what is moved to
  Connection(UniqueFd socket) : socket_(std::move(socket)) {}  // NOLINT: a plain one is a socket
  Connection(UniqueFd socket, std::unique_ptr<TlsSession> tls)
      : socket_(std::move(socket)), tls_(std::move(tls)) {}
  Connection(Connection&&) = default;
  Connection& operator=(Connection&&) = default;

  bool valid() const { return socket_.valid(); }
  int fd() const { return socket_.get(); }
  TlsSession* tls() const { return tls_.get(); }
  bool encrypted() const { return tls_ != nullptr; }
  // The name in the other side's certificate; empty for a plain connection.
  std::string peer_name() const { return tls_ == nullptr ? "" : tls_->peer_name(); }

  // How many bytes were taken or received; 0: not now, wait until fd() is ready for `*events` (of
  // poll(2)). Never block. `bytes` is not empty. UNAVAILABLE: the connection is gone;
  // UNAUTHENTICATED: the other side does not believe this host's certificate.
  absl::StatusOr<size_t> TrySend(absl::Span<const char> bytes, short* events);
  absl::StatusOr<size_t> TryReceive(absl::Span<char> bytes, short* events);

  // Ends it: whoever waits for fd() is woken.
  void Shutdown();

  // Gives socket and session to somebody who sends and receives by himself.
  UniqueFd TakeSocket() { return std::move(socket_); }
  std::unique_ptr<TlsSession> TakeTls() { return std::move(tls_); }

 private:
  UniqueFd socket_;
  std::unique_ptr<TlsSession> tls_;  // uses the socket, so it goes first
};

// Waits until `fd` is ready for `events`. DEADLINE_EXCEEDED: "timed out".
absl::Status AwaitSocket(int fd, short events, absl::Time deadline);

// Tells a peer that it is over and lets it read what was sent: closing at once, with bytes of its
// own unread, would take our last words from it. Waits for its end at most `longest`.
void CloseGently(UniqueFd socket, absl::Duration longest);

}  // namespace presync
