// What the places of QEMUs that are started here and of libvirt's domains have in common: how much
// memory a guest may have, and the files that hold it.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "transport/sync/target_host.h"
#include "transport/unique_fd.h"

namespace presync {

// RESOURCE_EXHAUSTED if `guest` has more memory than `max_guest_bytes`; 0 = no limit.
absl::Status CheckGuestSize(const std::string& guest, const std::vector<RegionRequest>& regions,
                            uint64_t max_guest_bytes);

// Writes a file anew (0600): a reader finds the old one or the new one, never half of it. It is
// made beside it, its name ending in ".new", through no link. Not synced to a disk. UNAVAILABLE: it
// can't; the old one stands.
absl::Status ReplaceFile(const std::string& path, absl::string_view text);

// The text of a small plain file that presyncd wrote; empty if it is anything else: not there, a
// symbolic link, a FIFO, or longer than 64 KiB.
std::string ReadSmallFile(const std::string& path);

// Makes a folder that is presyncd's own (0700), unless it is there: then it is looked at, for who
// may write there may replace what lies in it. FAILED_PRECONDITION: it is another user's, or others
// may write there, with what to do; `setting` is its key in the configuration. A folder like /tmp,
// where everybody may write but only replace what is his, will do where `shared` allows it.
absl::Status MakeOwnFolder(const std::string& path, absl::string_view setting, bool shared);

// Lets every user through the folder to what he knows the name of, but not list it.
absl::Status LetThrough(const std::string& path);

// Takes the folder for this process, as long as the descriptor is open: what lies in it is one
// presyncd's. ALREADY_EXISTS: another one has it, with what to do; `setting` is the key to change.
absl::StatusOr<UniqueFd> LockFolder(const std::string& path, absl::string_view setting);

// Ok too if it is not there. UNAVAILABLE: it can't.
absl::Status RemoveFile(const std::string& path);

}  // namespace presync
