// Starts a QEMU: the target's, which has to outlive the presyncd that started it.
#pragma once

#include <sys/types.h>

#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "qemu-glue/qemu_log.h"
#include "qemu-glue/qemu_user.h"
#include "qemu-glue/qmp/qmp_client.h"
#include "transport/unique_fd.h"

namespace presync {

// A child process. Destroying the object leaves QEMU running: it belongs to the guest, not to us.
// (Under systemd the service needs KillMode=process.) One thread at a time.
class QemuProcess {
 public:
  struct Options {
    std::vector<std::string> argv;  // the binary first, searched in PATH; no shell in between
    std::string qmp_path;           // where its monitor will answer; must occur in argv
    std::string log_path;           // stdout and stderr are appended: qemu_log.h
    std::optional<ProcessUser> user = std::nullopt;  // whom it runs as; none: as this process
    // Called as soon as it is there, before anything is waited for. It may be ended all the same.
    std::function<void(pid_t pid, uint64_t start_ticks)> on_started = nullptr;
  };

  // Starts it as SpawnApart does, with the log for its output, and connects to its monitor.
  // INVALID_ARGUMENT: no arguments. NOT_FOUND, PERMISSION_DENIED: the binary or the log.
  // FAILED_PRECONDITION: QEMU ended at once; the text has its last words. DEADLINE_EXCEEDED: no
  // answer in time; QEMU was killed. Else as QmpClient::Connect, QEMU killed. After an error
  // nothing that the command started answers at `qmp_path`.
  static absl::StatusOr<QemuProcess> Start(const Options& options, absl::Time deadline);

  QemuProcess(QemuProcess&&) = default;
  QemuProcess& operator=(QemuProcess&&) = default;

  pid_t pid() const { return pid_; }
  // Clock ticks since boot (field 22 of /proc/PID/stat): with the pid it names the process for
  // ever, also for a later presyncd.
  uint64_t start_ticks() const { return start_ticks_; }

  // The monitor connection, once: QEMU serves one client.
  std::unique_ptr<QmpClient> TakeMonitor() { return std::move(monitor_); }

  // Whether it has ended; reaps it then.
  bool HasEnded();
  // SIGKILL, then waits until it has ended and reaps it. Ok if it has ended before.
  // DEADLINE_EXCEEDED.
  absl::Status Kill(absl::Time deadline);
  // Waits for its end until `deadline`; reaps it then. False: it lives.
  bool AwaitEnd(absl::Time deadline) { return Reap(deadline); }
  // The end of what it wrote to its log, a few lines.
  std::string LastWords() const { return log_.WordsSinceOpened(); }

 private:
  QemuProcess(pid_t pid, UniqueFd pidfd, QemuLog log);
  std::string ExplainEnd(const std::optional<ProcessUser>& user) const;
  absl::Status ConnectMonitor(const Options& options, absl::Time deadline);
  void KillDescendant(const std::string& qmp_path) const;
  bool Reap(absl::Time deadline);

  pid_t pid_;
  UniqueFd pidfd_;
  QemuLog log_;
  uint64_t start_ticks_ = 0;
  std::unique_ptr<QmpClient> monitor_;
  bool reaped_ = false;
};

}  // namespace presync
