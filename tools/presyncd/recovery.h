// After a restart: handovers that an earlier presyncd left open, finished or rolled back.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "qemu-glue/qemu_target_host.h"
#include "transport/sync/dialer.h"

namespace presync {

// Goes through the handover records in `folder`, by these rules (docs/protocol.md, "After a
// crash"):
//   source, preparing    the guest is this host's: it is resumed if the handover had stopped it
//   source, given-up     the target is asked; only its word that it never ran it resumes the guest
//   here target, waiting      nobody told it to run: its QEMU is ended target, told-to-run  it is
//   this host's: run
// Returns, for people, what could not be settled and what to do about it. Blocks for some seconds
// at most for each open record.
std::vector<std::string> RecoverHandovers(
    const std::string& folder, QemuTargetHost* host, const PeerSecurity& security,
    const std::function<void(bool problem, const std::string& line)>& log);

}  // namespace presync
