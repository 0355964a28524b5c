// When a source's session compares while the guest runs.
#include <string>
#include <utility>

#include "absl/strings/str_cat.h"
#include "transport/clock.h"
#include "transport/sync/source_session.h"
#include "transport/wire/version.h"

namespace presync {
namespace {

// A main loop that hangs, as with a disk that does, must not hold the sync up.
constexpr absl::Duration kLookTimeout = absl::Milliseconds(100);
constexpr absl::Duration kLookAfterFailure = absl::Seconds(5);

absl::Status CannotBeCompared(const std::string& guest, SessionState state,
                              const std::string& problem) {
  return absl::FailedPreconditionError(absl::StrCat(
      guest, " can't be compared: it is ", StateName(state), problem.empty() ? "" : ": ", problem));
}

}  // namespace

absl::StatusOr<ComparisonReport> SourceSession::Verify() {
  {
    MutexLock lock(&mutex_);
    if (published_.state != SessionState::kSyncing) {
      return CannotBeCompared(options_.guest, published_.state, published_.problem);
    }
  }
  return comparisons_.Verify();
}

absl::Status SourceSession::NoComparison() const {
  return CannotBeCompared(options_.guest, state_, problem_);
}

// What is known of the requests of the guest's devices, now and then, so that pages get settled
// (unsettled_pages.h). A look that fails is made up for by the next: it covers the time since the
// last one that succeeded.
void SourceSession::LookAtRequests() {
  const absl::Time now = MonotonicNow();
  if (Open() || Ended() || now < next_look_ || !sync_->wants_request_looks()) return;
  const absl::StatusOr<RequestLook> look = guest_->LookAtRequests(now + kLookTimeout);
  next_look_ = now + (look.ok() ? options_.look_every : kLookAfterFailure);
  if (look.ok()) sync_->OnRequestLook(*look);
}

// An order that nothing can come of is answered at once.
absl::Status SourceSession::Compare() {
  if (connection_.version < kHashesVersion) {
    sync_->set_proven();  // if it was begun with a newer presync there: the rest is sent
    comparisons_.Drop(absl::UnimplementedError(absl::StrCat(
        "the presync of ", dialer_->peer(), " is too old to compare a running guest: upgrade it")));
    return absl::OkStatus();
  }
  const bool syncing = state_ == SessionState::kSyncing;
  if (!syncing && !sync_->unproven()) comparisons_.DropButSettling(NoComparison());
  const bool may_begin = syncing && waiting_launches_ == 0;
  const bool unproven = sync_->unproven();
  absl::Status stepped =
      comparisons_.Step(sync_.get(), connection_.channel.get(), may_begin, MonotonicNow());
  if (unproven && !sync_->unproven()) {
    resumption_.Look(*sync_, comparisons_.status().proof.hash_bytes);  // before anything is sent
    options_.log(false, absl::StrCat(options_.guest, ": the copy on ", dialer_->peer(),
                                     " is proven, but for ", sync_->residual(), " pages"));
  }
  return stepped;
}

}  // namespace presync
