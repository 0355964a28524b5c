#include "qemu-glue/qemu_process.h"

#include <fcntl.h>
#include <signal.h>
#include <spawn.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <fstream>
#include <iterator>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/ascii.h"
#include "absl/strings/str_cat.h"
#include "qemu-glue/process_identity.h"
#include "qemu-glue/qmp/wait.h"
#include "transport/clock.h"

namespace presync {
namespace {

// How often a monitor that is not there yet is tried; QEMU needs some 100 ms to get there.
constexpr absl::Duration kTryAgain = absl::Milliseconds(5);
constexpr std::streamoff kLastWordsBytes = 2000;

// posix_spawn's two option blocks.
struct SpawnOptions {
  posix_spawn_file_actions_t actions;
  posix_spawnattr_t attributes;

  SpawnOptions() {
    posix_spawn_file_actions_init(&actions);
    posix_spawnattr_init(&attributes);
  }
  SpawnOptions(const SpawnOptions&) = delete;
  SpawnOptions& operator=(const SpawnOptions&) = delete;
  ~SpawnOptions() {
    posix_spawn_file_actions_destroy(&actions);
    posix_spawnattr_destroy(&attributes);
  }
};

int FillSpawnOptions(SpawnOptions& options, int log_fd) {
  sigset_t none;
  sigset_t all;
  sigemptyset(&none);
  sigfillset(&all);
  const int results[] = {
      posix_spawn_file_actions_addopen(&options.actions, 0, "/dev/null", O_RDONLY, 0),
      posix_spawn_file_actions_adddup2(&options.actions, log_fd, 1),
      posix_spawn_file_actions_adddup2(&options.actions, log_fd, 2),
      posix_spawn_file_actions_addclosefrom_np(&options.actions, 3),
      posix_spawn_file_actions_addchdir_np(&options.actions, "/"),
      posix_spawnattr_setsigmask(&options.attributes, &none),
      posix_spawnattr_setsigdefault(&options.attributes, &all),
      posix_spawnattr_setflags(&options.attributes,
                               POSIX_SPAWN_SETSID | POSIX_SPAWN_SETSIGMASK | POSIX_SPAWN_SETSIGDEF),
  };
  const int* failed =
      std::find_if(std::begin(results), std::end(results), [](int result) { return result != 0; });
  return failed == std::end(results) ? 0 : *failed;
}

absl::StatusOr<pid_t> Spawn(const QemuProcess::Options& options) {
  UniqueFd log(::open(options.log_path.c_str(),
                      O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC | O_NOFOLLOW, 0600));
  if (!log.valid()) {
    return absl::ErrnoToStatus(errno, absl::StrCat("start QEMU: open its log ", options.log_path));
  }
  SpawnOptions spawn;
  int error = FillSpawnOptions(spawn, log.get());
  std::vector<char*> argv;
  for (const std::string& argument : options.argv)
    argv.push_back(const_cast<char*>(argument.c_str()));
  argv.push_back(nullptr);
  pid_t pid = -1;
  if (error == 0) {
    error = ::posix_spawnp(&pid, argv[0], &spawn.actions, &spawn.attributes, argv.data(), environ);
  }
  if (error != 0) return absl::ErrnoToStatus(error, absl::StrCat("start QEMU: run ", argv[0]));
  return pid;
}

std::streamoff SizeOf(const std::string& path) {
  std::ifstream file(path, std::ios::binary | std::ios::ate);
  return file ? static_cast<std::streamoff>(file.tellg()) : 0;
}

}  // namespace

QemuProcess::QemuProcess(pid_t pid, UniqueFd pidfd, std::string log_path, std::streamoff log_begin)
    : pid_(pid), pidfd_(std::move(pidfd)), log_path_(std::move(log_path)), log_begin_(log_begin) {
  start_ticks_ = StartTicks(pid_);
}

absl::StatusOr<QemuProcess> QemuProcess::Start(const Options& options, absl::Time deadline) {
  if (options.argv.empty() || options.argv[0].empty()) {
    return absl::InvalidArgumentError("start QEMU: no arguments");
  }
  const std::streamoff log_begin = SizeOf(options.log_path);
  absl::StatusOr<pid_t> pid = Spawn(options);
  if (!pid.ok()) return pid.status();
  // Our own child keeps its number until we reap it, so this is it.
  UniqueFd pidfd(static_cast<int>(::syscall(SYS_pidfd_open, *pid, 0)));
  if (!pidfd.valid()) {
    absl::Status status = absl::ErrnoToStatus(errno, "start QEMU: pidfd_open");
    ::kill(*pid, SIGKILL);
    ::waitpid(*pid, nullptr, 0);
    return status;
  }
  QemuProcess process(*pid, std::move(pidfd), options.log_path, log_begin);
  if (options.on_started != nullptr) options.on_started(process.pid_, process.start_ticks_);
  absl::Status status = process.ConnectMonitor(options.qmp_path, deadline);
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

absl::Status QemuProcess::ConnectMonitor(const std::string& path, absl::Time deadline) {
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
      return absl::FailedPreconditionError(absl::StrCat(
          "start QEMU: it ended at once; its last words (", log_path_, "): ", LastWords()));
    }
    if (!not_yet) return monitor.status();
    if (MonotonicNow() >= deadline) {
      return absl::DeadlineExceededError(absl::StrCat(
          "start QEMU: its monitor does not answer in time: ", monitor.status().message(),
          "; its last words (", log_path_, "): ", LastWords()));
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

std::string QemuProcess::LastWords() const {
  std::ifstream file(log_path_, std::ios::binary | std::ios::ate);
  if (!file) return "";
  const std::streamoff size = file.tellg();
  file.seekg(std::clamp(size - kLastWordsBytes, std::min(log_begin_, size), size));
  std::string text((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
  return std::string(absl::StripAsciiWhitespace(text));
}

}  // namespace presync
