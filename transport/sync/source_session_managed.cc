// Launches of a guest that has a manager (libvirt): who begins them, and what is done before.
#include <optional>
#include <string>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "transport/clock.h"
#include "transport/printable.h"
#include "transport/sync/conversation.h"
#include "transport/sync/source_session.h"

namespace presync {
namespace {

using Body = wire::ControlMessage;

constexpr absl::Duration kGuestTimeout = absl::Seconds(5);
// How often everything stale is sent while the manager may stop the guest at any moment.
constexpr absl::Duration kRoundEvery = absl::Milliseconds(5);

}  // namespace

// The target's libvirt is about to start the process that waits.
absl::Status SourceSession::OnLaunchComing() {
  ManagedLaunch* managed = guest_->managed();
  absl::Status ready;
  if (managed == nullptr) {
    ready = absl::FailedPreconditionError("this guest has no manager");
  } else if (state_ != SessionState::kSyncing) {
    ready = absl::FailedPreconditionError(
        absl::StrCat(options_.guest, " is not in sync yet (", StateName(state_),
                     "): wait until presync status says syncing"));
  } else if (!outlook_.mirrorable.ok()) {
    ready = outlook_.mirrorable;
  } else {
    ready = managed->Expect(MonotonicNow() + kGuestTimeout);
  }
  if (ready.ok()) {
    coming_since_ = MonotonicNow();
    ReserveRecord().IgnoreError();  // the launch tries again, and says so
    options_.log(false, absl::StrCat(options_.guest, ": libvirt is about to move it"));
  }
  Body answer;
  answer.mutable_launch_expected()->set_code(static_cast<uint32_t>(ready.code()));
  answer.mutable_launch_expected()->set_text(std::string(ready.message()));
  return connection_.channel->Send(answer, MonotonicNow() + kGuestTimeout);
}

void SourceSession::OnLaunchOff(const std::string& reason) {
  if (guest_->managed() == nullptr || !guest_->managed()->expected()) return;
  guest_->managed()->Forget();
  options_.log(true, absl::StrCat(options_.guest,
                                  ": libvirt does not move it after all: ", PrintableText(reason)));
}

// The manager stops the guest without asking: what is stale then, the guest stands still for. So
// rounds run flat out from the moment on that it may.
absl::Status SourceSession::TickManaged() {
  const absl::Time now = MonotonicNow();
  if (now < next_round_) return absl::OkStatus();
  next_round_ = now + kRoundEvery;
  if (absl::Status s = sync_->Scan(); !s.ok()) return s;
  return sync_->PushAll();
}

// `order` may be null: then nobody ordered anything here, but the manager may move the guest all
// the same.
void SourceSession::ServeManaged(LaunchOrder* order) {
  if (Open() || Ended()) {
    if (order == nullptr) return;
    manager_told_ = false;
    return Answer(order, absl::FailedPreconditionError(
                             absl::StrCat(options_.guest, " is ", StateName(state_))));
  }
  ManagedLaunch* managed = guest_->managed();
  if (managed->Begun()) return TakeUpManaged(order);
  if (order == nullptr) return;
  if (!manager_told_) return BeginManaged(order);
  const std::optional<absl::Status> end = managed->TakeOrderEnd();
  if (!end) {
    WaitABit();
    return;
  }
  manager_told_ = false;
  managed->Forget();
  Answer(order, end->ok()
                    ? absl::InternalError(
                          "libvirt says that it moved the guest, but its device state did not "
                          "come through presync: look where the guest runs")
                    : *end);
}

void SourceSession::BeginManaged(LaunchOrder* order) {
  absl::Status fit = CheckLaunchable();
  if (fit.ok()) fit = CheckGuest();
  if (fit.ok()) fit = guest_->managed()->Order();
  if (!fit.ok()) return Answer(order, fit);
  manager_told_ = true;
}

// The manager has begun to save the guest.
void SourceSession::TakeUpManaged(LaunchOrder* order) {
  LaunchOrder own{.options = {}, .ordered_at = coming_since_};
  LaunchOrder* const launch = order != nullptr ? order : &own;
  manager_told_ = false;
  if (absl::Status fit = CheckLaunchable(); !fit.ok()) {
    const absl::Status resumed = guest_->Resume(MonotonicNow() + absl::Seconds(30));
    if (!resumed.ok()) {
      state_ = SessionState::kStuck;
      problem_ = std::string(resumed.message());
    }
    Answer(launch, fit);
  } else {
    HandOver(launch);
  }
  if (launch == &own) options_.on_managed_launch(own.ordered_at, own.result);
}

// While the order is the manager's: the sync goes on, but need not turn idly.
void SourceSession::WaitABit() {
  if (connected_) {
    sync_->AwaitLink(MonotonicNow() + absl::Milliseconds(1)).IgnoreError();
  } else {
    absl::SleepFor(absl::Milliseconds(1));
  }
}

}  // namespace presync
