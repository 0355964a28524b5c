// The process behind a monitor: which one it is, whether it still lives, and its end.
#pragma once

#include <sys/types.h>

#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "qemu-glue/qmp/qmp_client.h"
#include "transport/unique_fd.h"

namespace presync {

// Holds a pidfd, so a process that reuses the number is never taken for this one. Movable; one
// thread at a time.
class PeerProcess {
 public:
  // Finds the process and makes sure of it: the kernel names whoever called listen(), which may be
  // a parent that passed the socket on (as libvirtd does with the sockets of a domain's devices and
  // with its own monitor, though not with what stands in `qemu:commandline`), or a proxy. So that
  // process must also own the threads that QEMU names as its vCPUs. A monitor that lies about them
  // names its own process: what it has mapped is asked of that (qemu-glue/mapped_file.h).
  // FAILED_PRECONDITION: it doesn't; else as QmpClient::Execute.
  static absl::StatusOr<PeerProcess> Identify(QmpClient& qmp, absl::Time deadline);

  pid_t pid() const { return pid_; }
  // Its arguments, as /proc has them. UNAVAILABLE: it has ended.
  absl::StatusOr<std::vector<std::string>> CommandLine() const;
  bool HasEnded() const;
  // Blocks until it has ended (it may still be a zombie: its parent reaps it). DEADLINE_EXCEEDED.
  absl::Status AwaitEnd(absl::Time deadline) const;
  // SIGKILL. Ok if it has ended. PERMISSION_DENIED.
  absl::Status Kill() const;

 private:
  PeerProcess(pid_t pid, UniqueFd pidfd) : pid_(pid), pidfd_(std::move(pidfd)) {}
  pid_t pid_;
  UniqueFd pidfd_;
};

}  // namespace presync
