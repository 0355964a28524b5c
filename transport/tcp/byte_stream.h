// A connected pair of byte pipes, all that the TCP link knows of its network: a plain socket here,
// and whatever wraps one (TLS) elsewhere.
#pragma once

#include <sys/uio.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "absl/types/span.h"
#include "transport/tls/connection.h"
#include "transport/unique_fd.h"

namespace presync {

struct PathState {
  // How much longer bytes took to the peer and back than they ever did: what they wait in queues.
  absl::Duration queueing_delay = absl::ZeroDuration();
  absl::Duration round_trip = absl::ZeroDuration();  // the least that was ever seen
  absl::Duration age = absl::ZeroDuration();         // since the last acknowledgement
  uint64_t retransmits = 0;  // segments sent again, since the connection was made
};

// One thread may send while another receives; Shutdown, SetPacing and path()
// may be called from any thread.
class ByteStream {
 public:
  virtual ~ByteStream() = default;

  // Blocks until all bytes of `parts` were taken over by the network's own buffers: they may be
  // changed then. Uses `parts` up. UNAVAILABLE: the connection is gone.
  virtual absl::Status Send(absl::Span<iovec> parts) = 0;

  // Blocks until at least one byte was received, fills `parts` in order and returns how many bytes.
  // UNAVAILABLE: the peer closed, or the connection is gone. Precondition: `parts` has room.
  virtual absl::StatusOr<size_t> Receive(absl::Span<const iovec> parts) = 0;

  // Ends the connection: calls that block return soon, later ones fail. Idempotent.
  virtual void Shutdown() = 0;

  // Caps what this stream sends, bytes per second; 0 = no cap. May be ignored.
  virtual void SetPacing(uint64_t bytes_per_s) = 0;

  // What the connection has seen of its path; nothing where that is not known.
  virtual std::optional<PathState> path() const { return std::nullopt; }
};

struct SocketOptions {
  // A peer that acknowledges nothing for so long is gone.
  absl::Duration peer_timeout = absl::Seconds(10);
  // Bytes that may wait in the kernel before they are on the wire: short queues without limiting
  // the window. 0 = the kernel's default.
  int max_unsent_bytes = 512 << 10;
  // SO_SNDBUF: unsent and unacknowledged bytes together; 0 = the kernel tunes it.
  int send_buffer_bytes = 0;
};

// Over a connected stream socket. TCP's own options are skipped on other sockets (socketpair).
// INVALID_ARGUMENT: not a connected stream socket, or an option was refused.
absl::StatusOr<std::unique_ptr<ByteStream>> MakeSocketStream(UniqueFd socket,
                                                             const SocketOptions& options);

// Over connections, which may be within TLS: then each byte goes through OpenSSL, 16 KiB a record.
// Errors as above.
absl::StatusOr<std::vector<std::unique_ptr<ByteStream>>> MakeStreams(
    std::vector<Connection> connections, const SocketOptions& options);

}  // namespace presync
