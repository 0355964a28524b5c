// Whether whoever started a guest's QEMU starts it again when it ends: after a move that would be a
// second guest.
#pragma once

#include <optional>
#include <string>

#include "tools/presync/doctor.h"

namespace presync {

// The unit of systemd's that a process belongs to, by its cgroup: /proc/PID/cgroup. Empty: none.
std::string UnitOf(const std::string& cgroup);

// What `systemctl show -p Restart -p ExecCondition UNIT` says of it.
Finding JudgeUnit(const std::string& unit, const std::string& properties);

// Both, of a process of this host. Nothing where no service of systemd's started it.
std::optional<Finding> ExamineRestart(int pid);

}  // namespace presync
