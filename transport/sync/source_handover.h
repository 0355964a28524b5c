// The source's side of a handover: from the order to launch until the guest runs on the target, or
// goes on here as if nothing had happened. docs/protocol.md, "Handover", tells the steps and who
// may run the guest at each of them.
#pragma once

#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/time/time.h"
#include "transport/guest.h"
#include "transport/sync/handover_record.h"
#include "transport/sync/source_sync.h"
#include "transport/wire/control_channel.h"

namespace presync {

struct HandoverOptions {
  // For the hash requests that this handover needs to settle pages; no other request of the
  // conversation has it. 0: the target is too old to be asked, and these pages are sent again.
  uint32_t hash_id = 0;
  bool verify = false;  // hash all of the guest's memory on both sides before the target may run it
  // Longest that the guest may stand still before the handover is called off.
  absl::Duration switchover_timeout = absl::Seconds(10);
  // Longest that the rounds before it may take.
  absl::Duration rounds_timeout = absl::Seconds(60);
  // The guest is told to stop when what is left to send takes this long: about what stopping it and
  // saving its device state take anyway (10 to 15 and 10 ms under TCG, tools/demo, 2026-11-24), so
  // it costs nothing.
  absl::Duration overlapped_transfer = absl::Milliseconds(35);
};

// What happened, in the source's clock. Times count from the order to launch.
struct HandoverReport {
  absl::Duration launch = absl::ZeroDuration();    // order to the target's word that the guest runs
  absl::Duration downtime = absl::ZeroDuration();  // guest stopped to the same moment
  std::vector<std::pair<std::string, absl::Duration>> steps;  // end of each step, in order
  PageCount residual_at_launch = 0;
  PageCount residual_at_stop = 0;
  uint32_t rounds = 0;
  bool managed = false;  // by the guest's manager, whose preparations are part of `launch`
  uint64_t state_bytes = 0;
  uint64_t wire_bytes = 0;  // memory sent after the order, as on the wire
  // Of the memory whose last change the dirty log may not have seen (unsettled_pages.h): compared
  // when the guest stood still, and sent again because it had changed. How long that took beyond
  // the residual.
  PageCount unsettled_pages = 0;
  PageCount unsettled_differing = 0;
  absl::Duration unsettled_took = absl::ZeroDuration();
  PageCount pages_compared = 0;  // with `verify`
  PageCount pages_differing = 0;
};

enum class HandoverResult {
  kMoved,  // the guest runs on the target
  kHere,   // called off before it was given up: the guest runs here again
  kStuck,  // called off, but the guest could not be resumed here yet: it is this host's, and stands
           // still
  kInDoubt,  // given up, and no answer since: only the target can say (AskOutcome)
};

struct HandoverEnd {
  HandoverResult result = HandoverResult::kHere;
  absl::Status why;  // ok only with kMoved
  HandoverReport report;
};

// Runs one handover over an attached link. Blocks. `record` is where giving up is written; it has
// phase kPreparing. Whatever fails before the record says kGivenUp resumes the guest here. The
// report's times count from `ordered_at`.
HandoverEnd RunSourceHandover(ControlChannel* channel, SourceSync* sync, SourceGuest* guest,
                              const GuestMemory& memory, HandoverRecord* record,
                              const HandoverOptions& options, absl::Time ordered_at);

}  // namespace presync
