// The places of QemuTargetHost: a guest's memory files and the QEMU that waits for its state.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "transport/memory.h"
#include "transport/sync/target_host.h"

namespace presync {

class QemuTargetHost;

// Where one guest's things lie.
struct GuestPaths {
  std::string qmp, glue, log;
  std::string note;              // guest_notes.h: while a QEMU lives
  std::string copy;              // copy_note.h: while the memory is a copy that may be taken up
  std::vector<std::string> ram;  // in the regions' order
};

// A guest's name is plain (letters, digits, '-', '_', '.'), and so are the regions'.
GuestPaths MakePaths(const std::string& run_folder, const std::string& ram_folder,
                     const std::string& guest, const std::vector<RegionRequest>& regions);

// Makes the memory files, zeroed; a failure leaves none. Errors as Region::Create.
absl::StatusOr<GuestMemory> CreateMemory(const std::vector<RegionRequest>& regions,
                                         const GuestPaths& paths);
// Opens those that are there. Errors as Region::Open.
absl::StatusOr<GuestMemory> ReopenMemory(const std::vector<RegionRequest>& regions,
                                         const GuestPaths& paths);

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
