#include "transport/guest.h"

namespace presync {

GuestOutlook SourceGuest::Look(absl::Time deadline) {
  const absl::StatusOr<RunState> state = State(deadline);
  GuestOutlook outlook;
  if (!state.ok()) {
    outlook.launchable = state.status();
  } else if (*state == RunState::kGone) {
    outlook.launchable = absl::UnavailableError("its process here has ended");
  } else if (*state != RunState::kRunning) {
    outlook.launchable = absl::FailedPreconditionError(
        "the guest is paused here; a launch would run it on the target: resume it first");
  }
  return outlook;
}

}  // namespace presync
