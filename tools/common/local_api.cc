#include "tools/common/local_api.h"

#include <errno.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>

#include "absl/strings/str_cat.h"
#include "transport/clock.h"
#include "transport/json.h"
#include "transport/unique_fd.h"
#include "transport/unix_address.h"

namespace presync {
namespace {

using Json = nlohmann::json;

// How soon an interruption is noticed that came just before the wait began: one that comes within
// it ends it at once.
constexpr absl::Duration kLookForInterruption = absl::Milliseconds(200);

}  // namespace

Json StatusToJson(const absl::Status& status) {
  if (status.ok()) return {{"ok", true}};
  return {{"ok", false},
          {"code", absl::StatusCodeToString(status.code())},
          {"error", std::string(status.message())}};
}

absl::Status JsonToStatus(const Json& answer) {
  if (FlagOr(answer, "ok", false)) return absl::OkStatus();
  const std::string code = TextOr(answer, "code", "UNKNOWN");
  for (int value = 1; value <= 16; ++value) {
    const auto status_code = static_cast<absl::StatusCode>(value);
    if (absl::StatusCodeToString(status_code) == code) {
      return absl::Status(status_code, TextOr(answer, "error", "no reason was given"));
    }
  }
  return absl::UnknownError(TextOr(answer, "error", "no reason was given"));
}

absl::Status WriteJsonLine(int fd, const Json& json) {
  const std::string line = json.dump(-1, ' ', true, Json::error_handler_t::replace) + "\n";
  size_t sent = 0;
  while (sent < line.size()) {
    const ssize_t n = ::send(fd, line.data() + sent, line.size() - sent, MSG_NOSIGNAL);
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0) return absl::UnavailableError("the other side closed the local socket");
    sent += static_cast<size_t>(n);
  }
  return absl::OkStatus();
}

absl::StatusOr<Json> ReadJsonLine(int fd, absl::Time deadline,
                                  const std::atomic<bool>* interrupted) {
  std::string line;
  char buffer[4096];
  while (line.find('\n') == std::string::npos) {
    if (line.size() > kMaxLocalLineBytes) return absl::InvalidArgumentError("the line is too long");
    if (interrupted != nullptr && *interrupted) return absl::CancelledError("interrupted");
    const absl::Duration left = deadline - MonotonicNow();
    const absl::Duration wait =
        interrupted == nullptr ? left : std::min(left, kLookForInterruption);
    const int64_t left_ms = std::clamp<int64_t>(
        absl::ToInt64Milliseconds(absl::Ceil(wait, absl::Milliseconds(1))), 0, 1 << 30);
    pollfd p = {.fd = fd, .events = POLLIN, .revents = 0};
    const int ready = ::poll(&p, 1, static_cast<int>(left_ms));
    if (ready < 0 && errno == EINTR) continue;
    if (ready == 0 && wait < left) continue;
    if (ready == 0) return absl::DeadlineExceededError("no answer in time");
    const ssize_t n = ::recv(fd, buffer, sizeof(buffer), 0);
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0) return absl::UnavailableError("the other side closed the local socket");
    line.append(buffer, static_cast<size_t>(n));
  }
  Json json = ParseJson(std::string_view(line).substr(0, line.find('\n')));
  if (!json.is_object()) return absl::InvalidArgumentError("the line is not a JSON object");
  return json;
}

absl::StatusOr<Json> CallLocal(const std::string& socket_path, const Json& request,
                               absl::Time deadline, const std::atomic<bool>* interrupted) {
  const absl::StatusOr<sockaddr_un> address = UnixAddress(socket_path);
  if (!address.ok()) return address.status();
  const UniqueFd fd(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0));
  if (!fd.valid() || ::connect(fd.get(), Raw(*address), sizeof(*address)) != 0) {
    const bool denied = errno == EACCES;
    return absl::UnavailableError(absl::StrCat(
        "can't reach presyncd at ", socket_path, ": ", std::strerror(errno),
        denied ? "; presyncd takes orders from root, its own user and the members of socket_group "
                 "(presyncd.toml): sudo presync ..., or join that group"
               : "; is it running? (systemctl start presyncd, or --socket for another place)"));
  }
  if (absl::Status s = WriteJsonLine(fd.get(), request); !s.ok()) return s;
  return ReadJsonLine(fd.get(), deadline, interrupted);
}

int64_t NumberOr(const Json& object, const char* key, int64_t fallback) {
  const auto it = object.find(key);
  return it != object.end() && it->is_number_integer() ? it->get<int64_t>() : fallback;
}

std::string TextOr(const Json& object, const char* key, const std::string& fallback) {
  const auto it = object.find(key);
  return it != object.end() && it->is_string() ? it->get<std::string>() : fallback;
}

bool FlagOr(const Json& object, const char* key, bool fallback) {
  const auto it = object.find(key);
  return it != object.end() && it->is_boolean() ? it->get<bool>() : fallback;
}

}  // namespace presync
