// What libvirt on the target is about to do with a guest, told to the guest's source.
#include <string>

#include "absl/strings/str_cat.h"
#include "transport/clock.h"
#include "transport/sync/conversation.h"
#include "transport/sync/target_service.h"

namespace presync {
namespace {

// The messages are small: a source that takes longer to read one does not read at all.
constexpr absl::Duration kSendTimeout = absl::Seconds(2);

}  // namespace

// The slot of a guest while a conversation serves it; null otherwise.
TargetSlot* TargetService::FindServed(const std::string& guest) {
  for (TargetSlot& slot : slots_) {
    if (slot.guest == guest && slot.channel != nullptr && !slot.closing) return &slot;
  }
  return nullptr;
}

absl::Status TargetService::AnnounceLaunch(const std::string& guest, absl::Time deadline) {
  wire::ControlMessage coming;
  coming.mutable_launch_coming();
  MutexLock lock(&mutex_);
  TargetSlot* slot = FindServed(guest);
  if (slot == nullptr) {
    return absl::UnavailableError(absl::StrCat(
        "the presyncd of ", guest, "'s source is not connected: what is mirrored here is stale"));
  }
  slot->launch_expected.reset();
  const SessionId session = slot->session;
  // Under the lock, for the channel is its conversation's: that may end at any time.
  if (absl::Status s = slot->channel->Send(coming, MonotonicNow() + kSendTimeout); !s.ok())
    return s;
  const auto answered = [&] {
    mutex_.AssertHeld();
    slot = FindServed(guest);
    return slot == nullptr || slot->session != session || slot->launch_expected.has_value();
  };
  const bool in_time = mutex_.AwaitWithDeadline(answered, deadline);
  if (!in_time) {
    return absl::DeadlineExceededError(absl::StrCat("the source of ", guest, " does not answer"));
  }
  if (slot == nullptr || slot->session != session) {
    return absl::UnavailableError(absl::StrCat("the source of ", guest, " is gone"));
  }
  return *slot->launch_expected;
}

void TargetService::RetractLaunch(const std::string& guest, const std::string& why) {
  wire::ControlMessage off;
  off.mutable_launch_off()->set_reason(why);
  MutexLock lock(&mutex_);
  TargetSlot* slot = FindServed(guest);
  if (slot == nullptr || !slot->launch_expected.has_value()) return;
  slot->launch_expected.reset();
  slot->channel->Send(off, MonotonicNow() + kSendTimeout).IgnoreError();
}

void TargetService::NoteLaunchExpected(TargetSlot* slot, const wire::LaunchExpected& answer) {
  absl::Status status;
  if (answer.code() != 0) {
    wire::Refused refused;
    refused.set_code(answer.code());
    refused.set_text(answer.text());
    status = RefusedStatus(refused, "its source");
  }
  MutexLock lock(&mutex_);
  slot->launch_expected = status;
}

}  // namespace presync
