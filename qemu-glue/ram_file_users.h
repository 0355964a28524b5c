// Who else has a guest's RAM files mapped.
#pragma once

#include <sys/types.h>

#include <string>
#include <vector>

namespace presync {

// A warning for each process, other than QEMU itself (`qemu`) and this one, that has one of the
// files mapped for writing by all (MAP_SHARED): what it writes no dirty log sees. The paths are
// QEMU's word: a file that QEMU itself has not mapped so is passed over. Looks through
// /proc/*/maps by device and inode; a process that this one may not look at is passed over. Takes
// some 20 us a process.
std::vector<std::string> FindRamFileUsers(const std::vector<std::string>& paths, pid_t qemu);

// Whether a line of /proc/PID/maps is a shared, writable mapping of the file with these numbers.
bool IsSharedWritable(const std::string& line, unsigned device_major, unsigned device_minor,
                      unsigned long inode);

}  // namespace presync
