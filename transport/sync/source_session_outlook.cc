// What a source's session knows of its guest apart from its memory: whether a launch could work.
#include <algorithm>
#include <string>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "transport/clock.h"
#include "transport/sync/source_session.h"

namespace presync {
namespace {

// A QEMU whose main loop is busy answers late; the sync must not wait for it for long, nor often.
constexpr absl::Duration kLookTimeout = absl::Seconds(2);
constexpr absl::Duration kAfterTimeout = absl::Seconds(30);
// Costs a microsecond a region.
constexpr absl::Duration kMemoryLookEvery = absl::Milliseconds(100);

}  // namespace

// Takes note of what stands in a launch's way, and says what is new.
void SourceSession::LookAtGuest(absl::Duration longest) {
  GuestOutlook seen = guest_->Look(MonotonicNow() + longest);
  next_watch_ = MonotonicNow() +
                (absl::IsDeadlineExceeded(seen.launchable) ? kAfterTimeout : options_.watch_every);
  if (seen.launchable != outlook_.launchable) {
    const bool ok = seen.launchable.ok();
    options_.log(!ok, absl::StrCat(options_.guest, ": ",
                                   ok ? "nothing stands in a launch's way any more"
                                      : seen.launchable.message()));
  }
  for (const std::string& warning : seen.warnings) {
    if (std::find(outlook_.warnings.begin(), outlook_.warnings.end(), warning) ==
        outlook_.warnings.end()) {
      options_.log(true, absl::StrCat(options_.guest, ": ", warning));
    }
  }
  if (seen.was_written_unseen) unproven_again_ = true;
  if (seen.shape != outlook_.shape) shape_told_ = false;
  outlook_ = std::move(seen);
}

// Beside the sync, from time to time. Not while a manager is about to stop the guest: then every
// millisecond counts.
void SourceSession::WatchGuest() {
  if (Open() || Ended()) return;
  if (const absl::Time now = MonotonicNow(); now >= next_memory_look_) {
    next_memory_look_ = now + kMemoryLookEvery;
    if (absl::Status s = memory_->Check(); !s.ok()) return EndWithMemory(s);
  }
  ManagedLaunch* managed = guest_->managed();
  const bool in_haste = managed != nullptr && (managed->expected() || manager_told_);
  if (MonotonicNow() >= next_watch_ && !in_haste) LookAtGuest(kLookTimeout);
  if (absl::IsUnavailable(outlook_.launchable)) return EndWithGuest();
  if (std::exchange(unproven_again_, false)) ProveAgain();
  if (connected_ && !shape_told_) {
    LoseLink(absl::AbortedError(absl::StrCat("the guest's devices or disks changed; asking ",
                                             dialer_->peer(), " whether it still fits")));
  }
}

// Whether the guest that waits on the target can take this one's state, as far as that was
// compared.
absl::Status SourceSession::CheckFit() const {
  if (differences_.empty()) return absl::OkStatus();
  return absl::FailedPreconditionError(
      absl::StrCat(dialer_->peer(),
                   " could not take the guest's device state: ", absl::StrJoin(differences_, "; "),
                   ". Give the QEMU that is started for it there (its presyncd.toml) the same "
                   "machine and devices "
                   "as this one has, then presync stop and presync start"));
}

// What the target said when it was connected to.
void SourceSession::NoteFit() {
  differences_ = connection_.differences;
  fit_warnings_.clear();
  for (const std::string& each : connection_.warnings) {
    fit_warnings_.push_back(absl::StrCat(
        dialer_->peer(), " would run another guest, and QEMU would not say so: ", each));
  }
  if (absl::Status s = CheckFit(); !s.ok()) {
    options_.log(true, absl::StrCat(options_.guest, ": ", s.message()));
  }
  for (const std::string& each : fit_warnings_) {
    options_.log(true, absl::StrCat(options_.guest, ": ", each));
  }
}

std::vector<std::string> SourceSession::Warnings() const {
  std::vector<std::string> all = outlook_.warnings;
  all.insert(all.end(), fit_warnings_.begin(), fit_warnings_.end());
  return all;
}

// Its memory was written past the dirty log: nothing that was synced is known to be right.
void SourceSession::ProveAgain() {
  const std::string why =
      "something that wrote guest memory unseen is gone; all of the copy is compared again";
  options_.log(true, absl::StrCat(options_.guest, ": ", why));
  if (connected_) LoseLink(absl::AbortedError(why));
  sync_->DetachLink();
  sync_->NoteContent(SourceSync::TargetContent::kUnproven);
}

void SourceSession::EndWithGuest() {
  comparisons_.Drop(absl::AbortedError("the guest's QEMU has ended"));
  Settle(
      SessionState::kFailed,
      absl::UnavailableError(absl::StrCat(
          "the guest's QEMU here has ended: it was shut down, killed or crashed, and its own log "
          "says which. Nothing is left to launch; presync stop ",
          options_.guest, " takes it off the list")));
}

// What was sent of it since is not known to be right, and never will be.
void SourceSession::EndWithMemory(const absl::Status& why) {
  comparisons_.Drop(why);
  Settle(SessionState::kFailed,
         absl::Status(why.code(), absl::StrCat(why.message(),
                                               ". The sync has ended, and the copy is "
                                               "not used; the guest is left alone")));
}

bool SourceSession::GuestIsGone() {
  const absl::StatusOr<RunState> state = guest_->State(MonotonicNow() + kLookTimeout);
  return state.ok() && *state == RunState::kGone;
}

// What an operator has to know beside a link's troubles.
std::string SourceSession::Problem() const {
  const bool matters = state_ == SessionState::kConnecting || state_ == SessionState::kFirstPass ||
                       state_ == SessionState::kSyncing;
  std::vector<std::string> all;
  if (!problem_.empty()) all.push_back(problem_);
  if (matters && !outlook_.launchable.ok()) {
    all.push_back(std::string(outlook_.launchable.message()));
  }
  if (const absl::Status fit = CheckFit(); matters && !fit.ok()) {
    all.push_back(std::string(fit.message()));
  }
  return absl::StrJoin(all, "; and ");
}

}  // namespace presync
