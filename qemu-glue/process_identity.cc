#include "qemu-glue/process_identity.h"

#include <poll.h>
#include <signal.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <fstream>
#include <iterator>
#include <optional>
#include <vector>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "transport/unique_fd.h"

namespace presync {
namespace {

struct Stat {
  char state = '\0';
  uint64_t start_ticks = 0;
};

// /proc/PID/stat (proc(5)): the second field is a name in parentheses with anything in it. Nothing
// if there is no such process.
std::optional<Stat> ReadStat(pid_t pid) {
  std::ifstream file(absl::StrCat("/proc/", pid, "/stat"));
  const std::string text((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
  const size_t name_end = text.rfind(')');
  if (name_end == std::string::npos) return std::nullopt;
  const std::vector<std::string> fields =
      absl::StrSplit(text.substr(name_end + 1), ' ', absl::SkipEmpty());
  constexpr size_t kStartField = 22 - 3;  // the first field after the name is the third
  if (fields.size() <= kStartField) return std::nullopt;
  Stat stat = {.state = fields[0][0]};
  (void)absl::SimpleAtoi(fields[kStartField], &stat.start_ticks);
  return stat;
}

std::string BootId() {
  std::ifstream file("/proc/sys/kernel/random/boot_id");
  std::string id;
  file >> id;
  return id;
}

}  // namespace

uint64_t StartTicks(pid_t pid) { return ReadStat(pid).value_or(Stat()).start_ticks; }

bool IsAlive(pid_t pid, uint64_t start_ticks) {
  const std::optional<Stat> stat = ReadStat(pid);
  return stat && stat->start_ticks == start_ticks && stat->state != 'Z' && stat->state != 'X';
}

ProcessIdentity IdentifyProcess(pid_t pid) {
  return {.pid = pid, .start_ticks = StartTicks(pid), .boot = BootId()};
}

absl::Status EndProcess(const ProcessIdentity& process, absl::Duration longest) {
  const UniqueFd held(static_cast<int>(::syscall(SYS_pidfd_open, process.pid, 0)));
  if (!Lives(process)) return absl::OkStatus();
  // It lived after it was held: it is this one.
  if (!held.valid() || ::syscall(SYS_pidfd_send_signal, held.get(), SIGKILL, nullptr, 0) != 0) {
    if (!Lives(process)) return absl::OkStatus();
    return absl::PermissionDeniedError(
        absl::StrCat("kill QEMU (process ", process.pid, "): ", std::strerror(errno)));
  }
  pollfd p = {.fd = held.get(), .events = POLLIN, .revents = 0};
  if (::poll(&p, 1, static_cast<int>(absl::ToInt64Milliseconds(longest))) > 0) {
    return absl::OkStatus();
  }
  return absl::DeadlineExceededError(
      absl::StrCat("QEMU (process ", process.pid, ") was killed and has not ended yet"));
}

std::string FormatProcess(const ProcessIdentity& process) {
  if (!process.known()) return "";
  return absl::StrCat(process.pid, " ", process.start_ticks, " ", process.boot);
}

ProcessIdentity ParseProcess(const std::string& text) {
  const std::vector<std::string> fields = absl::StrSplit(text, ' ');
  ProcessIdentity process;
  if (fields.size() != 3 || !absl::SimpleAtoi(fields[0], &process.pid) || process.pid <= 0 ||
      !absl::SimpleAtoi(fields[1], &process.start_ticks)) {
    return {};
  }
  process.boot = fields[2];
  return process;
}

bool Lives(const ProcessIdentity& process) {
  return process.known() && process.boot == BootId() && IsAlive(process.pid, process.start_ticks);
}

}  // namespace presync
