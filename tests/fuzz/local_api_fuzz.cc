// presyncd's local socket: lines as a client may send them, and what the daemon makes of the
// requests in them; and the answers that `presync` reads. No request reaches a guest or a network:
// its monitor is made one that does not exist.
#include <spdlog/spdlog.h>
#include <sys/socket.h>

#include "tests/fuzz/control_peer.h"
#include "tests/fuzz/fuzz_input.h"
#include "tools/common/local_api.h"
#include "tools/presyncd/daemon.h"
#include "transport/clock.h"

namespace presync {
namespace {

using Json = nlohmann::json;

Daemon& TheDaemon() {
  static Daemon* const daemon = [] {
    spdlog::set_level(spdlog::level::off);
    Config config;
    config.listen_port = 0;
    config.rdma = false;
    config.state_folder = fuzz::ScratchFolder() + "/state";
    config.run_folder = fuzz::ScratchFolder() + "/run";
    config.ram_folder = fuzz::ScratchFolder() + "/ram";
    return Daemon::Create(config).value().release();
  }();
  return *daemon;
}

}  // namespace
}  // namespace presync

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace presync;  // NOLINT
  Daemon& daemon = TheDaemon();
  fuzz::SocketPair pair = fuzz::MakeSocketPair();
  fuzz::SendAtOnce(pair.peer.get(), {reinterpret_cast<const char*>(data), size});
  ::shutdown(pair.peer.get(), SHUT_WR);
  absl::StatusOr<Json> request =
      ReadJsonLine(pair.product.get(), MonotonicNow() + absl::Seconds(2));
  const absl::Status told = request.ok() ? JsonToStatus(*request) : request.status();
  if (!request.ok()) {
    FUZZ_REQUIRE(JsonToStatus(StatusToJson(told)).code() == told.code());
    return 0;
  }
  (*request)["qmp"] = "/nonexistent/qmp";
  const Json answer = daemon.Handle(*request);
  FUZZ_REQUIRE(answer.is_object() && answer.contains("ok"));
  FUZZ_REQUIRE(WriteJsonLine(pair.product.get(), answer).ok() || !answer.dump().empty());
  return 0;
}
