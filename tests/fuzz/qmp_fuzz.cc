// The QMP client against a QEMU that answers what it likes, and what reads its answers: what the
// guest is, whether it can be mirrored, what a migration says. The input is all that QEMU sends;
// ids of answers count from 1.
#include <poll.h>
#include <sys/socket.h>
#include <sys/un.h>

#include <condition_variable>
#include <mutex>
#include <thread>

#include "qemu-glue/discovery.h"
#include "qemu-glue/guest_shape.h"
#include "qemu-glue/qemu_guest_calls.h"
#include "qemu-glue/qmp/qmp_client.h"
#include "tests/fuzz/fuzz_input.h"
#include "transport/clock.h"

namespace presync {
namespace {

// Listens at a path, and plays one script for each connection, from a thread of its own.
class FuzzMonitor {
 public:
  FuzzMonitor() : path_(fuzz::ScratchFolder() + "/qmp") {
    sockaddr_un address = {};
    address.sun_family = AF_UNIX;
    path_.copy(address.sun_path, path_.size());
    listener_.reset(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0));
    FUZZ_REQUIRE(::bind(listener_.get(), reinterpret_cast<sockaddr*>(&address), sizeof(address)) ==
                 0);
    FUZZ_REQUIRE(::listen(listener_.get(), 4) == 0);
  }
  const std::string& path() const { return path_; }

  // Serves one connection: sends all of `bytes`, hangs up its direction, takes what comes.
  void Serve(std::string_view bytes) {
    const UniqueFd socket(::accept4(listener_.get(), nullptr, nullptr, SOCK_CLOEXEC));
    char taken[4096];
    while (true) {
      while (!bytes.empty()) {
        const ssize_t n =
            ::send(socket.get(), bytes.data(), bytes.size(), MSG_NOSIGNAL | MSG_DONTWAIT);
        if (n <= 0) break;
        bytes.remove_prefix(static_cast<size_t>(n));
        if (bytes.empty()) ::shutdown(socket.get(), SHUT_WR);
      }
      if (bytes.empty()) ::shutdown(socket.get(), SHUT_WR);
      pollfd p = {.fd = socket.get(),
                  .events = static_cast<short>(bytes.empty() ? POLLIN : POLLIN | POLLOUT),
                  .revents = 0};
      ::poll(&p, 1, -1);
      const ssize_t n = ::recv(socket.get(), taken, sizeof(taken), MSG_DONTWAIT);
      if (n == 0 || (n < 0 && errno != EAGAIN && errno != EINTR)) return;
    }
  }

 private:
  const std::string path_;
  UniqueFd listener_;
};

void Ask(const std::string& path, uint8_t which) {
  const absl::Time deadline = MonotonicNow() + absl::Seconds(2);
  absl::StatusOr<std::unique_ptr<QmpClient>> qmp = QmpClient::Connect(path, deadline);
  if (!qmp.ok()) return;
  switch (which % 5) {
    case 0: {
      const absl::StatusOr<GuestInfo> guest = DescribeGuest(**qmp, deadline);
      if (!guest.ok()) return;
      (void)CheckTrackable(**qmp, *guest, deadline);
      return;
    }
    case 1: {
      const GuestInfo guest = {.run_state = "inmigrate",
                               .backends = {{.id = "ram0", .path = "/x"}}};
      (void)CheckTarget(**qmp, guest, guest.backends, deadline);
      (void)DescribeShape(**qmp, deadline);
      return;
    }
    case 2:
      (void)AwaitMigration(**qmp, "save", {"completed"}, deadline);
      (void)QueryRunState(**qmp, deadline);
      return;
    case 3: {
      const absl::StatusOr<PeerProcess> process = PeerProcess::Identify(**qmp, deadline);
      if (process.ok()) (void)QueryGuestState(**qmp, *process, deadline);
      return;
    }
    default:
      (void)(*qmp)->ExecuteUntil("cont", nullptr, "RESUME", deadline);
      (void)(*qmp)->WaitEvent("STOP", deadline);
      (void)(*qmp)->Post("quit", nullptr, deadline);
      (void)(*qmp)->WaitEvent("SHUTDOWN", deadline);
  }
}

}  // namespace
}  // namespace presync

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace presync;  // NOLINT
  static auto* const monitor = new FuzzMonitor();
  fuzz::FuzzInput input(data, size);
  const uint8_t which = input.Byte();
  std::thread qemu([&] { monitor->Serve(input.rest()); });
  Ask(monitor->path(), which);
  qemu.join();
  return 0;
}
