// The files behind a process's memory, got from the process itself: never by a name that somebody
// says.
#pragma once

#include <cstdint>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "qemu-glue/qmp/peer_process.h"
#include "transport/memory.h"
#include "transport/unique_fd.h"

namespace presync {

// Opens a file that `process` itself has mapped, for reading and writing. `said_path` is what QEMU
// calls it: it only tells which of the mappings is meant, so a process that names another's file
// has it refused, and a file that has lost its name is found all the same. The file is opened by
// the process's mapping or by its descriptor, and then all `size_bytes` of it must be mapped by the
// process, shared and writable.
//
// FAILED_PRECONDITION: it has mapped no such file, or otherwise, or it is no regular file.
// PERMISSION_DENIED: no right to look at the process, or at the file. UNAVAILABLE: it has ended.
absl::StatusOr<UniqueFd> OpenMappedFile(const PeerProcess& process, const std::string& said_path,
                                        uint64_t size_bytes);

// The same, as a region of guest memory that is called `name`; its path is the one that the file
// really has. Errors also as Region::Adopt.
absl::StatusOr<Region> OpenMappedRegion(const PeerProcess& process, const std::string& name,
                                        const std::string& said_path, uint64_t size_bytes);

// Whether `process` has mapped all `size_bytes` of the open file `fd` once, shared and writable.
// Errors as above.
absl::Status CheckMapped(const PeerProcess& process, const std::string& name, int fd,
                         uint64_t size_bytes);

}  // namespace presync
