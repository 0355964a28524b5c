// The places of QemuTargetHost: a guest's memory files and the QEMU that waits for its state.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "qemu-glue/guest_notes.h"
#include "transport/memory.h"
#include "transport/sync/target_host.h"

namespace presync {

class QemuTargetHost;

// Makes the memory files, zeroed; a failure leaves none. Errors as Region::Create.
absl::StatusOr<GuestMemory> CreateMemory(const std::vector<RegionRequest>& regions,
                                         const GuestPaths& paths);
// Opens those that are there. Errors as Region::Open.
absl::StatusOr<GuestMemory> ReopenMemory(const std::vector<RegionRequest>& regions,
                                         const GuestPaths& paths);

// Removes what a guest's QEMU has beside its memory: its folder, its sockets, and then its note.
// What can't be removed stays.
void RemoveTraces(const GuestPaths& paths);

// A place made here, whose QEMU is started when it is asked for. `command` is filled in already;
// `fresh`: the memory is zero. `host` must outlive it.
std::unique_ptr<TargetPlace> MakeStartedPlace(QemuTargetHost* host, std::string guest,
                                              std::vector<std::string> command, GuestPaths paths,
                                              std::vector<RegionRequest> regions,
                                              GuestMemory memory, bool fresh);

// A place whose QEMU waits already. Errors as TargetHost::MakePlace.
absl::StatusOr<std::unique_ptr<TargetPlace>> MakeAttachedPlace(
    const std::string& qmp_path, const std::vector<RegionRequest>& regions);

}  // namespace presync
