#include "qemu-glue/process_identity.h"

#include <fstream>
#include <iterator>
#include <vector>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"

namespace presync {
namespace {

struct Stat {
  char state = '\0';
  uint64_t start_ticks = 0;
};

// /proc/PID/stat (proc(5)): the second field is a name in parentheses with anything in it.
Stat ReadStat(pid_t pid) {
  std::ifstream file(absl::StrCat("/proc/", pid, "/stat"));
  const std::string text((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
  const size_t name_end = text.rfind(')');
  if (name_end == std::string::npos) return {};
  const std::vector<std::string> fields =
      absl::StrSplit(text.substr(name_end + 1), ' ', absl::SkipEmpty());
  constexpr size_t kStartField = 22 - 3;  // the first field after the name is the third
  if (fields.size() <= kStartField) return {};
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

uint64_t StartTicks(pid_t pid) { return ReadStat(pid).start_ticks; }

ProcessIdentity IdentifyProcess(pid_t pid) {
  return {.pid = pid, .start_ticks = StartTicks(pid), .boot = BootId()};
}

bool Lives(const ProcessIdentity& process) {
  if (!process.known() || process.boot != BootId()) return false;
  const Stat stat = ReadStat(process.pid);
  return stat.start_ticks == process.start_ticks && stat.state != 'Z' && stat.state != 'X';
}

}  // namespace presync
