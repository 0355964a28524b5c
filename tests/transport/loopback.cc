#include "tests/transport/loopback.h"

#include <utility>

#include "transport/clock.h"
#include "transport/tcp/socket.h"

namespace presync {

absl::StatusOr<SocketPairs> ConnectLoopback(size_t count) {
  const absl::Time deadline = MonotonicNow() + absl::Seconds(30);
  auto listener = Listen("127.0.0.1", 0);
  if (!listener.ok()) return listener.status();
  auto port = BoundPort(listener->get());
  if (!port.ok()) return port.status();
  SocketPairs pairs;
  for (size_t i = 0; i < count; ++i) {
    auto source = Connect("127.0.0.1", *port, deadline);
    if (!source.ok()) return source.status();
    auto target = Accept(listener->get(), deadline);
    if (!target.ok()) return target.status();
    pairs.source.push_back(*std::move(source));
    pairs.target.push_back(*std::move(target));
  }
  return pairs;
}

}  // namespace presync
