// Everything that a sync needs of a running QEMU guest, from its monitor's socket alone.
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "qemu-glue/discovery.h"
#include "qemu-glue/process_identity.h"
#include "transport/dirty_log.h"
#include "transport/guest.h"
#include "transport/memory.h"

namespace presync {

// Makes the guest of a monitor that was looked at: see QemuSourceGuest::Create.
using MakeSourceGuest = std::function<absl::StatusOr<std::unique_ptr<SourceGuest>>(
    std::unique_ptr<QmpClient> qmp, absl::Time deadline)>;

struct OpenGuestOptions {
  std::string qmp_path;
  std::string
      glue_path;  // the plug-in's socket; empty: found in QEMU's command line or environment
  std::string dirty_log = "auto";        // or "uffd-async", "uffd-handler"
  MakeSourceGuest make_guest = nullptr;  // null: a QEMU that presync itself moves
  // Looks at what answers at the monitor before anything is done with it: its error is OpenGuest's.
  std::function<absl::Status(const GuestInfo& info, const ProcessIdentity& process)> check =
      [](const GuestInfo&, const ProcessIdentity&) { return absl::OkStatus(); };
};

struct OpenedGuest {
  GuestInfo info;
  ProcessIdentity process;
  GuestMemory memory;
  std::unique_ptr<DirtyLog> log;
  std::unique_ptr<SourceGuest> guest;
  std::vector<std::string> notes;  // worth telling the operator
  // Pages may leave the guest's memory and come back while it runs (balloon, free-page reporting).
  bool memory_may_be_discarded = false;
  // Takes QEMU's userfaultfd off its memory again, so that background snapshots and post-copy work.
  // Call it when the sync was stopped for good and `log` is gone. Blocks for some seconds at most.
  std::function<absl::Status()> stop_tracking;
};

// Opens a guest as a source. The guest runs on untouched, whatever comes out. The monitor, the
// plug-in and the memory must be one process's: the one that opened the monitor's socket.
// FAILED_PRECONDITION: they are not, or it can't be mirrored; the text has every reason with its
// remedy. Else the errors of QmpClient and of OpenMappedRegion.
absl::StatusOr<OpenedGuest> OpenGuest(const OpenGuestOptions& options, absl::Time deadline);

// Where the plug-in of process `pid` listens, from `-plugin ...,socket=PATH` in `arguments` or from
// PRESYNC_GLUE_SOCKET in the environment of `pid`; empty if neither is there.
std::string FindGlueSocket(const std::vector<std::string>& arguments,
                           const std::string& environment);

}  // namespace presync
