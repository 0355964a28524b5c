#include "qemu-glue/qmp/peer_process.h"

#include <fcntl.h>
#include <signal.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <fstream>
#include <iterator>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "qemu-glue/qmp/wait.h"

namespace presync {

absl::StatusOr<PeerProcess> PeerProcess::Identify(QmpClient& qmp, absl::Time deadline) {
  // Held before the question below: if the answer fits a process that lives after it, it is this
  // one.
  const absl::StatusOr<SocketPeer>& peer = qmp.peer();
  if (!peer.ok()) {
    return absl::FailedPreconditionError(absl::StrCat(
        "QMP: ", qmp.path(),
        ": presync can't tell which process is the guest: ", peer.status().message(),
        "; give presync a monitor that QEMU opens itself: -qmp unix:PATH,", "server=on,wait=off"));
  }
  const pid_t pid = peer->pid;
  PeerProcess process(pid, UniqueFd(::fcntl(peer->pidfd.get(), F_DUPFD_CLOEXEC, 0)));
  absl::StatusOr<Json> cpus = qmp.Execute("query-cpus-fast", nullptr, deadline);
  if (!cpus.ok()) return cpus.status();
  bool certain = process.pidfd_.valid() && cpus->is_array() && !cpus->empty();
  for (const Json& cpu : *cpus) {
    std::optional<uint64_t> thread = UintAt(cpu, "thread-id");
    certain = certain && thread.has_value() &&
              ::access(absl::StrCat("/proc/", pid, "/task/", *thread).c_str(), F_OK) == 0;
  }
  if (!certain || process.HasEnded()) {
    return absl::FailedPreconditionError(
        absl::StrCat("QMP: ", qmp.path(), " was opened by process ", pid,
                     ", which doesn't hold this guest's vCPU threads, so presync can't tell which "
                     "process is the "
                     "guest; give presync a monitor that QEMU opens itself, in presync's own pid "
                     "namespace: -qmp "
                     "unix:PATH,server=on,wait=off"));
  }
  return process;
}

absl::StatusOr<std::vector<std::string>> PeerProcess::CommandLine() const {
  std::ifstream file(absl::StrCat("/proc/", pid_, "/cmdline"), std::ios::binary);
  const std::string text((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
  // Asked after the read: a process that still lives is the one whose file was read.
  if (text.empty() || HasEnded()) {
    return absl::UnavailableError(absl::StrCat("QEMU (process ", pid_, ") has ended"));
  }
  return std::vector<std::string>(absl::StrSplit(text, '\0'));
}

bool PeerProcess::HasEnded() const { return WaitReady(pidfd_.get(), POLLIN, absl::InfinitePast()); }

absl::Status PeerProcess::AwaitEnd(absl::Time deadline) const {
  if (WaitReady(pidfd_.get(), POLLIN, deadline)) return absl::OkStatus();
  return absl::DeadlineExceededError(
      absl::StrCat("QEMU (process ", pid_, ") has not ended in time"));
}

absl::Status PeerProcess::Kill() const {
  if (::syscall(SYS_pidfd_send_signal, pidfd_.get(), SIGKILL, nullptr, 0) == 0 || errno == ESRCH) {
    return absl::OkStatus();
  }
  return absl::PermissionDeniedError(absl::StrCat("kill QEMU (process ", pid_, "): ",
                                                  std::strerror(errno)));  // NOLINT
}

}  // namespace presync
