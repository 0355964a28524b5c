// Gives the memory that is mirrored here to a domain that libvirt is about to start. The one thing
// that presync does as root, in folders that QEMU's user may change at any moment.
#pragma once

#include <sys/types.h>

#include <string>
#include <vector>

#include "absl/status/status.h"

namespace presync {

// A file of mirrored memory: `path` must be the very file that presyncd has open.
struct MemoryFile {
  std::string path;
  std::string name;  // in the domain's folder
  dev_t device = 0;
  ino_t inode = 0;
};

// Links each file into the folder that libvirt made for the domain in `parent`, NUMBER-NAME with
// the name cut, and makes it that folder's owner's, mode 0600. Follows no symbolic link, and
// changes and links nothing but these files, whatever becomes of their names meanwhile. NOT_FOUND:
// there is no such folder. PERMISSION_DENIED: a folder or a file is not what it must be, with its
// name. UNAVAILABLE: it can't.
absl::Status LinkMemory(const std::string& parent, const std::string& domain_number,
                        const std::string& domain_name, const std::vector<MemoryFile>& files);

}  // namespace presync
