// A byte stream within TLS. The socket's own stream stays below it, for what is the socket's
// business: options, pacing, the round trip.
#include <errno.h>
#include <fcntl.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "transport/tcp/byte_stream.h"

namespace presync {
namespace {

// What a record holds at most (RFC 8446, 5.1): less is more records and system calls.
constexpr size_t kRecordBytes = 16 << 10;

class TlsStream final : public ByteStream {
 public:
  TlsStream(int fd, std::unique_ptr<ByteStream> socket, std::unique_ptr<TlsSession> tls)
      : fd_(fd), socket_(std::move(socket)), tls_(std::move(tls)) {}

  absl::Status Send(absl::Span<iovec> parts) override {
    while (!parts.empty()) {
      if (parts.front().iov_len == 0) {
        parts.remove_prefix(1);
        continue;
      }
      const absl::Span<const char> record = NextRecord(parts);
      if (absl::Status s = SendAll(record); !s.ok()) return s;
      Consume(&parts, record.size());
    }
    return absl::OkStatus();
  }

  absl::StatusOr<size_t> Receive(absl::Span<const iovec> parts) override {
    size_t total = 0;
    short events = 0;
    for (const iovec& part : parts) {
      for (size_t have = 0; have < part.iov_len;) {
        auto received = tls_->TryReceive(
            {static_cast<char*>(part.iov_base) + have, part.iov_len - have}, &events);
        if (received.ok() && *received > 0) {
          have += *received;
          total += *received;
          continue;
        }
        if (total > 0) return total;  // an error comes again at the next call
        if (!received.ok()) return Failed("receive", received.status());
        if (absl::Status s = AwaitSocket(fd_, events, absl::InfiniteFuture()); !s.ok()) return s;
      }
    }
    return total;
  }

  void Shutdown() override { socket_->Shutdown(); }
  void SetPacing(uint64_t bytes_per_s) override { socket_->SetPacing(bytes_per_s); }
  std::optional<PathState> path() const override { return socket_->path(); }

 private:
  static absl::Status Failed(const char* operation, const absl::Status& why) {
    return absl::UnavailableError(absl::StrCat(operation, ": ", why.message()));
  }

  // A record's worth of `parts`: where the first does not fill one, what follows is gathered.
  absl::Span<const char> NextRecord(absl::Span<const iovec> parts) {
    if (parts.front().iov_len >= kRecordBytes) {
      return {static_cast<const char*>(parts.front().iov_base), kRecordBytes};
    }
    size_t have = 0;
    for (const iovec& part : parts) {
      const size_t take = std::min(part.iov_len, kRecordBytes - have);
      std::memcpy(record_.data() + have, part.iov_base, take);
      have += take;
      if (have == kRecordBytes) break;
    }
    return {record_.data(), have};
  }

  static void Consume(absl::Span<iovec>* parts, size_t bytes) {
    while (bytes > 0) {
      iovec& front = parts->front();
      const size_t take = std::min(bytes, front.iov_len);
      front.iov_base = static_cast<char*>(front.iov_base) + take;
      front.iov_len -= take;
      bytes -= take;
      if (front.iov_len == 0) parts->remove_prefix(1);
    }
  }

  absl::Status SendAll(absl::Span<const char> bytes) {
    while (!bytes.empty()) {
      short events = 0;
      const absl::StatusOr<size_t> sent = tls_->TrySend(bytes, &events);
      if (!sent.ok()) return Failed("send", sent.status());
      bytes.remove_prefix(*sent);
      if (*sent > 0) continue;
      if (absl::Status s = AwaitSocket(fd_, events, absl::InfiniteFuture()); !s.ok()) return s;
    }
    return absl::OkStatus();
  }

  const int fd_;                              // socket_'s
  const std::unique_ptr<ByteStream> socket_;  // owns the descriptor
  const std::unique_ptr<TlsSession> tls_;     // uses it, so it goes first
  std::array<char, kRecordBytes> record_;     // the sender's
};

absl::StatusOr<std::unique_ptr<ByteStream>> MakeStream(Connection connection,
                                                       const SocketOptions& options) {
  std::unique_ptr<TlsSession> tls = connection.TakeTls();
  const int fd = connection.fd();
  auto socket = MakeSocketStream(connection.TakeSocket(), options);
  if (!socket.ok() || tls == nullptr) return socket;
  // Two threads share the session, so neither may wait within it.
  const int flags = ::fcntl(fd, F_GETFL);
  if (flags < 0 || ::fcntl(fd, F_SETFL, flags | O_NONBLOCK) != 0) {
    return absl::ErrnoToStatus(errno, "make a socket non-blocking");
  }
  return std::make_unique<TlsStream>(fd, *std::move(socket), std::move(tls));
}

}  // namespace

absl::StatusOr<std::vector<std::unique_ptr<ByteStream>>> MakeStreams(
    std::vector<Connection> connections, const SocketOptions& options) {
  std::vector<std::unique_ptr<ByteStream>> streams;
  for (Connection& connection : connections) {
    auto stream = MakeStream(std::move(connection), options);
    if (!stream.ok()) return stream.status();
    streams.push_back(*std::move(stream));
  }
  return streams;
}

}  // namespace presync
