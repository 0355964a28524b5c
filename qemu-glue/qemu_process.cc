#include "qemu-glue/qemu_process.h"

#include <signal.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "qemu-glue/process_identity.h"
#include "qemu-glue/qmp/wait.h"
#include "qemu-glue/spawn_apart.h"
#include "transport/clock.h"

namespace presync {
namespace {

// How often a monitor that is not there yet is tried; QEMU needs some 100 ms to get there.
constexpr absl::Duration kTryAgain = absl::Milliseconds(5);
}  // namespace

QemuProcess::QemuProcess(pid_t pid, UniqueFd pidfd, QemuLog log)
    : pid_(pid), pidfd_(std::move(pidfd)), log_(std::move(log)) {
  start_ticks_ = StartTicks(pid_);
}

absl::StatusOr<QemuProcess> QemuProcess::Start(const Options& options, absl::Time deadline) {
  if (options.argv.empty() || options.argv[0].empty()) {
    return absl::InvalidArgumentError("start QEMU: no arguments");
  }
  absl::StatusOr<QemuLog> log = QemuLog::Open(options.log_path);
  if (!log.ok()) return log.status();
  absl::StatusOr<pid_t> pid = SpawnApart(options.argv, log->fd(), options.user);
  if (!pid.ok()) {
    return absl::Status(pid.status().code(), absl::StrCat("start QEMU: ", pid.status().message()));
  }
  // Our own child keeps its number until we reap it, so this is it.
  UniqueFd pidfd(static_cast<int>(::syscall(SYS_pidfd_open, *pid, 0)));
  if (!pidfd.valid()) {
    absl::Status status = absl::ErrnoToStatus(errno, "start QEMU: pidfd_open");
    ::kill(*pid, SIGKILL);
    ::waitpid(*pid, nullptr, 0);
    return status;
  }
  QemuProcess process(*pid, std::move(pidfd), *std::move(log));
  if (options.on_started != nullptr) options.on_started(process.pid_, process.start_ticks_);
  absl::Status status = process.ConnectMonitor(options, deadline);
  if (status.ok()) return process;
  (void)process.Kill(MonotonicNow() + absl::Seconds(5));
  process.KillDescendant(options.qmp_path);
  return status;
}

// A command that makes another process of its QEMU (-daemonize, a script without exec) would leave
// one behind at each try. The socket is this command's own: what answers there and began after it
// is its doing.
void QemuProcess::KillDescendant(const std::string& qmp_path) const {
  const absl::StatusOr<std::unique_ptr<QmpClient>> monitor =
      QmpClient::Connect(qmp_path, MonotonicNow() + absl::Seconds(1));
  if (!monitor.ok()) return;
  const absl::StatusOr<SocketPeer>& peer = (*monitor)->peer();
  if (!peer.ok() || peer->pid == pid_ || peer->pid == ::getpid()) return;
  if (StartTicks(peer->pid) < start_ticks_) return;
  ::syscall(SYS_pidfd_send_signal, peer->pidfd.get(), SIGKILL, nullptr, 0);
}

// A set-up whose QEMUs had been presyncd's own user finds out here that they are not any more.
std::string QemuProcess::ExplainEnd(const std::optional<ProcessUser>& user) const {
  const std::string words = LastWords();
  std::string text = absl::StrCat("; its last words (", log_.path(), "): ", words);
  if (user && absl::StrContains(words, "ermission denied")) {
    absl::StrAppend(&text, "; it runs as user ", user->uid, " (qemu_user): what its command opens ",
                    "must be that user's or a group's of it, and sockets belong into {folder}");
  }
  return text;
}

absl::Status QemuProcess::ConnectMonitor(const Options& options, absl::Time deadline) {
  const std::string& path = options.qmp_path;
  while (true) {
    absl::StatusOr<std::unique_ptr<QmpClient>> monitor = QmpClient::Connect(path, deadline);
    if (monitor.ok() && (*monitor)->peer_pid() != pid_) {
      return absl::FailedPreconditionError(
          absl::StrCat("start QEMU: process ", (*monitor)->peer_pid(), " answers at ", path,
                       ", not the new QEMU (", pid_,
                       "); give each QEMU a socket of its own, and "
                       "let the command become QEMU itself (no -daemonize, exec in a script)"));
    }
    if (monitor.ok()) {
      monitor_ = *std::move(monitor);
      return absl::OkStatus();
    }
    // No socket yet, or the one that an earlier QEMU left behind.
    const bool not_yet =
        absl::IsNotFound(monitor.status()) || absl::IsUnavailable(monitor.status());
    if (WaitReady(pidfd_.get(), POLLIN,
                  not_yet ? MonotonicNow() + kTryAgain : absl::InfinitePast())) {
      return absl::FailedPreconditionError(
          absl::StrCat("start QEMU: it ended at once", ExplainEnd(options.user)));
    }
    if (!not_yet) return monitor.status();
    if (MonotonicNow() >= deadline) {
      return absl::DeadlineExceededError(absl::StrCat(
          "start QEMU: its monitor does not answer in time: ", monitor.status().message(),
          ExplainEnd(options.user)));
    }
  }
}

bool QemuProcess::Reap(absl::Time deadline) {
  if (reaped_) return true;
  if (!WaitReady(pidfd_.get(), POLLIN, deadline)) return false;
  while (::waitpid(pid_, nullptr, 0) < 0 && errno == EINTR) {
  }
  reaped_ = true;
  return true;
}

bool QemuProcess::HasEnded() { return Reap(absl::InfinitePast()); }

absl::Status QemuProcess::Kill(absl::Time deadline) {
  if (HasEnded()) return absl::OkStatus();
  if (::kill(pid_, SIGKILL) != 0) {
    return absl::ErrnoToStatus(errno, absl::StrCat("kill QEMU (process ", pid_, ")"));
  }
  if (Reap(deadline)) return absl::OkStatus();
  return absl::DeadlineExceededError(
      absl::StrCat("kill QEMU (process ", pid_, "): it has not ended yet"));
}

}  // namespace presync
