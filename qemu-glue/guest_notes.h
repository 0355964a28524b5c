// Notes about the QEMUs that presyncd starts, for the presyncd that comes after it: whose files lie
// about, and which process was meant.
#pragma once

#include <sys/types.h>

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/status.h"

namespace presync {

// Where one guest's things lie.
struct GuestPaths {
  std::string folder;      // NAME.d, where its QEMU may make files; its sockets are there
  std::string qmp, glue;   // the sockets
  std::string qmp_before;  // where earlier presyncds had them; links to them by now
  std::string glue_before;
  std::string log;
  std::string note;              // while a QEMU lives
  std::string copy;              // copy_note.h: while the memory is a copy that may be taken up
  std::vector<std::string> ram;  // in the regions' order
};

// A guest's name is plain (letters, digits, '-', '_', '.'), and so are the regions'.
GuestPaths MakePaths(const std::string& run_folder, const std::string& ram_folder,
                     const std::string& guest, const std::vector<std::string>& regions);

// One QEMU. The file NAME.guest in presyncd's run folder, JSON.
struct GuestNote {
  std::string guest;
  pid_t pid = 0;
  uint64_t start_ticks = 0;
  uid_t uid = 0;  // whom it runs as; 0 also in earlier presyncds' notes
  std::string qmp;
  // Names of its memory's regions. Empty in earlier presyncds' notes: these have paths of files,
  // which are not believed, for their QEMUs could write notes.
  std::vector<std::string> regions;
};

// Replaces the guest's note in `folder`. UNAVAILABLE: it can't.
absl::Status WriteGuestNote(const std::string& folder, const GuestNote& note);

// All notes in `folder`; files that are none are passed over. A note's socket is one of the two
// that `folder` has for its guest, whatever the file says.
std::vector<GuestNote> ReadGuestNotes(const std::string& folder);

// Whether its QEMU still lives.
bool IsAlive(const GuestNote& note);

}  // namespace presync
