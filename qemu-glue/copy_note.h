// Notes about copies of guests' memory that outlive the presyncd that made them: for the one that
// comes after it. A note is there only while the memory holds what a session's links confirmed, and
// no device or guest has written it.
#pragma once

#include <sys/types.h>

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "transport/memory.h"
#include "transport/sync/target_host.h"

namespace presync {

// A memory file, by name and by what it is: another one may be given the name.
struct CopiedFile {
  RegionRequest region;
  std::string path;
  uint64_t device = 0;
  uint64_t inode = 0;

  friend bool operator==(const CopiedFile& a, const CopiedFile& b) {
    return a.region.name == b.region.name && a.region.size_bytes == b.region.size_bytes &&
           a.path == b.path && a.device == b.device && a.inode == b.inode;
  }
};

// One copy. The file NAME.copy in presyncd's run folder, JSON.
struct CopyNote {
  std::string path;
  CopyOwner owner;
  // The presyncd that wrote it. While it lives, or is ending, its links may still write the memory.
  pid_t holder_pid = 0;
  uint64_t holder_start_ticks = 0;
  std::vector<CopiedFile> files;
};

// The files that `memory` consists of, as they are now.
std::vector<CopiedFile> FilesOf(const GuestMemory& memory);

// A note of this process about these files, replacing the file `path` at once. UNAVAILABLE: it
// can't; what was there before may still be.
absl::Status WriteCopyNote(const std::string& path, const CopyOwner& owner,
                           std::vector<CopiedFile> files);

// All notes in `folder`; files that are none are passed over.
std::vector<CopyNote> ReadCopyNotes(const std::string& folder);

}  // namespace presync
