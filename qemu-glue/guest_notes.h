// Notes about the QEMUs that presyncd starts, for the presyncd that comes after it: whose files lie
// about, and which process was meant.
#pragma once

#include <sys/types.h>

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/status.h"

namespace presync {

// One QEMU. The file NAME.guest in presyncd's run folder, JSON.
struct GuestNote {
  std::string path;
  pid_t pid = 0;
  uint64_t start_ticks = 0;
  std::string qmp;
  std::vector<std::string> files;
};

// Replaces the file `note.path`. UNAVAILABLE: it can't.
absl::Status WriteGuestNote(const GuestNote& note);

// All notes in `folder`; files that are none are passed over.
std::vector<GuestNote> ReadGuestNotes(const std::string& folder);

// Whether its QEMU still lives.
bool IsAlive(const GuestNote& note);

}  // namespace presync
