// TCP connections of a process to itself, for tests and benchmarks.
#pragma once

#include <cstddef>
#include <vector>

#include "absl/status/statusor.h"
#include "transport/unique_fd.h"

namespace presync {

struct SocketPairs {
  std::vector<UniqueFd> source, target;
};

// `count` connections over 127.0.0.1.
absl::StatusOr<SocketPairs> ConnectLoopback(size_t count);

}  // namespace presync
