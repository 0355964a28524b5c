#include "qemu-glue/spawn_apart.h"

#include <fcntl.h>
#include <linux/capability.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <cstdint>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "transport/unique_fd.h"

namespace presync {
namespace {

// landlock(7), in the kernel's words of 6.12; the headers of older systems lack the last ones.
struct LandlockRuleset {
  uint64_t handled_access_fs;
  uint64_t handled_access_net;
  uint64_t scoped;
};
struct __attribute__((packed)) LandlockPathBeneath {
  uint64_t allowed_access;
  int32_t parent_fd;
};
constexpr unsigned kLandlockVersionFlag = 1U << 0;
constexpr int kLandlockPathBeneath = 1;
constexpr uint64_t kLandlockRefer = uint64_t{1} << 13;
constexpr uint64_t kLandlockScopeSignal = uint64_t{1} << 1;
constexpr int kVersionWithRefer = 2;
constexpr int kVersionWithScopes = 6;
// How many bytes of the first structure a kernel without scopes knows.
constexpr size_t kRulesetBytesBeforeScopes = sizeof(uint64_t);

// What a program has to be in to be refused other processes. Landlock can only allow beneath
// folders that are named, and what files a command's devices need nobody knows: so no file is
// denied, which is what users and modes are for. Moving files between folders is denied by every
// ruleset that does not allow it: it is allowed everywhere. Not valid: there is no Landlock here.
UniqueFd MakeRuleset() {
  const int version = LandlockVersion();
  if (version < kVersionWithRefer) return UniqueFd();
  LandlockRuleset rules = {.handled_access_fs = kLandlockRefer,
                           .handled_access_net = 0,
                           .scoped = version >= kVersionWithScopes ? kLandlockScopeSignal : 0};
  const size_t bytes = version >= kVersionWithScopes ? sizeof(rules) : kRulesetBytesBeforeScopes;
  UniqueFd ruleset(static_cast<int>(::syscall(SYS_landlock_create_ruleset, &rules, bytes, 0)));
  const UniqueFd root(::open("/", O_PATH | O_DIRECTORY | O_CLOEXEC));
  const LandlockPathBeneath all = {.allowed_access = kLandlockRefer, .parent_fd = root.get()};
  if (!ruleset.valid() || !root.valid() ||
      ::syscall(SYS_landlock_add_rule, ruleset.get(), kLandlockPathBeneath, &all, 0) != 0) {
    return UniqueFd();
  }
  return ruleset;
}

// What the child says before it ends.
struct Failure {
  char step[32];
  int error;
};

struct Child {
  char* const* argv;
  int output;
  int ruleset;  // -1: none
  int failure;  // where a Failure goes
  const ProcessUser* user;
};

// Between fork and exec of a process with threads: system calls, and nothing that takes a lock.
class ChildSteps {
 public:
  explicit ChildSteps(const Child& child) : child_(child) {}

  [[noreturn]] void Run() {
    Settle();
    BecomeUser();
    Confine();
    TakeDescriptors();
    ::execvp(child_.argv[0], child_.argv);
    Fail("run", errno);
  }

 private:
  void Settle() {
    for (int signal = 1; signal < NSIG; ++signal) ::signal(signal, SIG_DFL);
    sigset_t none;
    sigemptyset(&none);
    ::sigprocmask(SIG_SETMASK, &none, nullptr);
    Need("setsid", ::setsid());
    Need("chdir", ::chdir("/"));
  }

  // The groups first: afterwards nobody may. The C library's own functions would ask other threads
  // to follow, which are not here.
  void BecomeUser() {
    if (child_.user == nullptr) return;
    const ProcessUser& user = *child_.user;
    Need("setgroups", ::syscall(SYS_setgroups, user.groups.size(), user.groups.data()));
    Need("setresgid", ::syscall(SYS_setresgid, user.gid, user.gid, user.gid));
    Need("setresuid", ::syscall(SYS_setresuid, user.uid, user.uid, user.uid));
    __user_cap_header_struct header = {.version = _LINUX_CAPABILITY_VERSION_3, .pid = 0};
    const __user_cap_data_struct nothing[_LINUX_CAPABILITY_U32S_3] = {};
    Need("capset", ::syscall(SYS_capset, &header, nothing));
  }

  void Confine() {
    Need("no_new_privs", ::prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0));
    if (child_.ruleset < 0) return;
    Need("landlock", ::syscall(SYS_landlock_restrict_self, child_.ruleset, 0));
  }

  // What is needed goes beyond the standard three first, for it may be one of them.
  void TakeDescriptors() {
    const int input = ::open("/dev/null", O_RDONLY | O_CLOEXEC);
    Need("open /dev/null", input);
    const int from = ::fcntl(input, F_DUPFD_CLOEXEC, 4);
    const int to = ::fcntl(child_.output, F_DUPFD_CLOEXEC, 4);
    const int failure = ::fcntl(child_.failure, F_DUPFD_CLOEXEC, 4);
    Need("dup", from < 0 || to < 0 || failure < 0 ? -1 : 0);
    Need("dup2", ::dup2(from, STDIN_FILENO));
    Need("dup2", ::dup2(to, STDOUT_FILENO));
    Need("dup2", ::dup2(to, STDERR_FILENO));
    Need("dup3", ::dup3(failure, 3, O_CLOEXEC));
    child_.failure = 3;
    Need("close_range", ::syscall(SYS_close_range, 4U, ~0U, 0));
  }

  void Need(const char* step, long result) {
    if (result < 0) Fail(step, errno);
  }

  [[noreturn]] void Fail(const char* step, int error) {
    Failure failure = {.step = {}, .error = error};
    for (size_t i = 0; step[i] != '\0' && i + 1 < sizeof(failure.step); ++i) {
      failure.step[i] = step[i];
    }
    (void)!::write(child_.failure, &failure, sizeof(failure));
    ::_exit(127);
  }

  Child child_;
};

}  // namespace

int LandlockVersion() {
  const long version =
      ::syscall(SYS_landlock_create_ruleset, nullptr, size_t{0}, kLandlockVersionFlag);
  return version < kVersionWithRefer ? 0 : static_cast<int>(version);
}

absl::StatusOr<pid_t> SpawnApart(const std::vector<std::string>& argv, int output,
                                 const std::optional<ProcessUser>& user) {
  std::vector<char*> words;
  for (const std::string& word : argv) words.push_back(const_cast<char*>(word.c_str()));
  words.push_back(nullptr);
  int ends[2];
  if (::pipe2(ends, O_CLOEXEC) != 0) return absl::ErrnoToStatus(errno, "pipe");
  const UniqueFd read_end(ends[0]);
  UniqueFd write_end(ends[1]);
  const UniqueFd ruleset = MakeRuleset();
  ChildSteps steps({.argv = words.data(),
                    .output = output,
                    .ruleset = ruleset.valid() ? ruleset.get() : -1,
                    .failure = write_end.get(),
                    .user = user ? &*user : nullptr});
  // No signal handler of ours runs in the child.
  sigset_t all;
  sigset_t before;
  sigfillset(&all);
  ::pthread_sigmask(SIG_SETMASK, &all, &before);
  const pid_t pid = ::fork();
  if (pid == 0) steps.Run();
  const int fork_error = errno;
  ::pthread_sigmask(SIG_SETMASK, &before, nullptr);
  if (pid < 0) return absl::ErrnoToStatus(fork_error, "fork");
  write_end.reset();
  Failure failure = {};
  ssize_t n = 0;
  do {
    n = ::read(read_end.get(), &failure, sizeof(failure));
  } while (n < 0 && errno == EINTR);
  if (n == 0) return pid;  // it is the program now
  while (::waitpid(pid, nullptr, 0) < 0 && errno == EINTR) {
  }
  failure.step[sizeof(failure.step) - 1] = '\0';
  const bool of_program = absl::string_view(failure.step) == "run";
  return absl::ErrnoToStatus(
      failure.error, of_program ? absl::StrCat("run ", argv[0]) : std::string(failure.step));
}

}  // namespace presync
