// Which process a process is, so that a later presyncd tells it from any other that has its number
// by then.
#pragma once

#include <sys/types.h>

#include <cstdint>
#include <string>

#include "absl/status/status.h"
#include "absl/time/time.h"

namespace presync {

// When a process started, in clock ticks since boot; 0: there is none with this number.
uint64_t StartTicks(pid_t pid);

// Whether the process that had this number and start lives, and is no zombie. Within one boot.
bool IsAlive(pid_t pid, uint64_t start_ticks);

struct ProcessIdentity {
  pid_t pid = 0;
  uint64_t start_ticks = 0;
  std::string boot;  // the kernel's id of the boot: ticks begin anew with each

  bool known() const { return pid > 0 && start_ticks > 0 && !boot.empty(); }
};

// Of a process that lives; not known() if there is none with this number.
ProcessIdentity IdentifyProcess(pid_t pid);

// Whether that very process lives; a zombie does not.
bool Lives(const ProcessIdentity& process);

// Kills that very process, and returns when it has ended. DEADLINE_EXCEEDED: it has not;
// PERMISSION_DENIED.
absl::Status EndProcess(const ProcessIdentity& process, absl::Duration longest);

// "PID START BOOT", for a record that a later presyncd reads; empty if it is not known().
std::string FormatProcess(const ProcessIdentity& process);
// Not known() if it is not of that form.
ProcessIdentity ParseProcess(const std::string& text);

}  // namespace presync
