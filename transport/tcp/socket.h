#pragma once
#include <string>
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "transport/unique_fd.h"
namespace presync {
struct AcceptedSocket { UniqueFd socket; std::string peer; };
absl::StatusOr<UniqueFd> ListenSocket(const std::string&, uint16_t);
absl::StatusOr<UniqueFd> ConnectSocket(const std::string&, uint16_t, absl::Time);
absl::StatusOr<AcceptedSocket> AcceptSocket(int, absl::Time);
}
