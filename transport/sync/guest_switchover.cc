#include "transport/sync/guest_switchover.h"

#include <errno.h>
#include <poll.h>
#include <unistd.h>

#include <cstring>
#include <vector>

#include "absl/strings/str_cat.h"
#include "transport/clock.h"

namespace presync {

absl::Status StateRelay::Relay(SourceGuest* guest, ControlChannel* channel, absl::Time deadline) {
  std::vector<char> buffer(kMaxStateChunkBytes);
  while (true) {
    if (cancelled_) return absl::CancelledError("the relay was cancelled");
    if (MonotonicNow() >= deadline) {
      return absl::DeadlineExceededError("the device state did not come to its end in time");
    }
    pollfd p = {.fd = stream_.get(), .events = POLLIN, .revents = 0};
    if (::poll(&p, 1, /*timeout ms, to notice the above=*/50) <= 0) continue;
    const ssize_t n = ::read(stream_.get(), buffer.data(), buffer.size());
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) {
      return absl::UnavailableError(absl::StrCat("device state stream: ", std::strerror(errno)));
    }
    if (n == 0) return absl::OkStatus();
    guest->OnSaved({buffer.data(), static_cast<size_t>(n)});
    wire::ControlMessage message;
    message.mutable_state_chunk()->set_data(buffer.data(), static_cast<size_t>(n));
    // After the read: what was read before staging began was saved before it, too.
    message.mutable_state_chunk()->set_staged(staged_);
    if (absl::Status s = channel->Send(message, deadline); !s.ok()) return s;
    bytes_ += static_cast<uint64_t>(n);
  }
}

absl::Status GuestSwitchover::Run(absl::Time rounds_deadline) {
  if (absl::Status s = guest_->PrepareSave(rounds_deadline); !s.ok()) return s;
  {
    MutexLock lock(&mutex_);
    mutex_.Await([this] {
      mutex_.AssertHeld();
      return go_;
    });
    if (cancelled_) return absl::CancelledError("the switchover was called off");
  }
  const absl::Time deadline = MonotonicNow() + timeout_;
  absl::StatusOr<UniqueFd> stream = guest_->BeginSave(deadline);
  if (!stream.ok()) return stream.status();
  // A manager stops the guest when it likes: what it saves may be of then from the first byte on.
  relay_.emplace(*std::move(stream), guest_, channel_, deadline, guest_->managed() != nullptr);
  const absl::StatusOr<absl::Time> stopped_at = guest_->Stop(deadline);
  if (!stopped_at.ok()) return stopped_at.status();
  relay_->StageFromNowOn();
  // A guest that does not say only has more compared.
  const absl::StatusOr<RequestLook> look = guest_->LookAtRequests(deadline);
  {
    MutexLock lock(&mutex_);
    last_look_ = look.value_or(RequestLook{});
    stopped_at_ = *stopped_at;
    stopped_ = true;
  }
  return guest_->FinishSave(deadline);
}

}  // namespace presync
