// The local socket: one JSON request and one answer per connection, each connection in its own
// thread.
#pragma once

#include <atomic>
#include <functional>
#include <list>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <thread>

#include "absl/status/statusor.h"
#include "tools/presyncd/local_access.h"
#include "transport/unique_fd.h"

namespace presync {

class LocalServer {
 public:
  using Handler = std::function<nlohmann::json(const nlohmann::json& request)>;

  // Listens at `path` (a socket nobody listens at is replaced) for those that `access` lets in: by
  // the file's mode, and again by the credentials that the kernel has of who connected; others are
  // answered with PERMISSION_DENIED. `handler` is called from many threads. ALREADY_EXISTS: another
  // presyncd listens there; UNAVAILABLE: the system's own words.
  static absl::StatusOr<std::unique_ptr<LocalServer>> Start(const std::string& path,
                                                            const LocalAccess& access,
                                                            Handler handler);
  // Stops accepting and waits for the requests under way.
  ~LocalServer();

 private:
  struct Request {
    std::thread thread;
    std::atomic<bool> done = false;
  };

  LocalServer(std::string path, UniqueFd listener, const LocalAccess& access, Handler handler);
  void Accept();
  void Serve(UniqueFd socket);

  const std::string path_;
  const UniqueFd listener_;
  const LocalAccess access_;
  const Handler handler_;
  std::atomic<bool> ending_ = false;
  std::list<Request> requests_;  // the acceptor's own
  std::thread acceptor_;         // last: it uses all of the above
};

}  // namespace presync
