#include "tools/presyncd/local_server.h"

#include <errno.h>
#include <poll.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cstring>
#include <utility>

#include "absl/strings/str_cat.h"
#include "tools/common/local_api.h"
#include "transport/clock.h"
#include "transport/unix_address.h"

namespace presync {
namespace {

constexpr int kAcceptPollMs = 200;
constexpr absl::Duration kRequestTimeout = absl::Seconds(10);
constexpr size_t kMaxRequests = 64;

}  // namespace

absl::StatusOr<std::unique_ptr<LocalServer>> LocalServer::Start(const std::string& path,
                                                                const LocalAccess& access,
                                                                Handler handler) {
  const absl::StatusOr<sockaddr_un> address = UnixAddress(path);
  if (!address.ok()) return address.status();
  const UniqueFd probe(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0));
  if (::connect(probe.get(), Raw(*address), sizeof(*address)) == 0) {
    return absl::AlreadyExistsError(absl::StrCat("another presyncd listens at ", path,
                                                 "; stop it or configure another socket"));
  }
  ::unlink(path.c_str());
  UniqueFd listener(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
  if (!listener.valid() || ::bind(listener.get(), Raw(*address), sizeof(*address)) != 0 ||
      !access.ApplyTo(path).ok() || ::listen(listener.get(), 16) != 0) {
    return absl::UnavailableError(absl::StrCat("listen at ", path, ": ", std::strerror(errno)));
  }
  return std::unique_ptr<LocalServer>(
      new LocalServer(path, std::move(listener), access, std::move(handler)));
}

LocalServer::LocalServer(std::string path, UniqueFd listener, const LocalAccess& access,
                         Handler handler)
    : path_(std::move(path)),
      listener_(std::move(listener)),
      access_(access),
      handler_(std::move(handler)),
      acceptor_([this] { Accept(); }) {}

LocalServer::~LocalServer() {
  ending_ = true;
  acceptor_.join();
  for (Request& request : requests_) request.thread.join();
  ::unlink(path_.c_str());
}

void LocalServer::Accept() {
  while (!ending_) {
    for (auto it = requests_.begin(); it != requests_.end();) {
      if (!it->done) {
        ++it;
        continue;
      }
      it->thread.join();
      it = requests_.erase(it);
    }
    pollfd p = {.fd = listener_.get(), .events = POLLIN, .revents = 0};
    if (::poll(&p, 1, kAcceptPollMs) <= 0 || requests_.size() >= kMaxRequests) continue;
    UniqueFd socket(::accept4(listener_.get(), nullptr, nullptr, SOCK_CLOEXEC));
    if (!socket.valid()) continue;
    Request& request = requests_.emplace_back();
    request.thread = std::thread([this, &request, socket = std::move(socket)]() mutable {
      Serve(std::move(socket));
      request.done = true;
    });
  }
}

void LocalServer::Serve(UniqueFd socket) {
  absl::StatusOr<nlohmann::json> request =
      ReadJsonLine(socket.get(), MonotonicNow() + kRequestTimeout);
  if (absl::Status s = access_.Check(socket.get()); !s.ok()) request = s;
  const nlohmann::json answer = request.ok() ? handler_(*request) : StatusToJson(request.status());
  WriteJsonLine(socket.get(), answer).IgnoreError();
}

}  // namespace presync
