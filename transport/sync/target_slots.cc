// The slots of the target's service: whose memory is whose, and for how long.
#include <algorithm>
#include <list>
#include <utility>

#include "absl/strings/str_cat.h"
#include "transport/clock.h"
#include "transport/sync/conversation.h"
#include "transport/sync/handover_record.h"
#include "transport/sync/target_service.h"

namespace presync {
namespace {

// Who may have an earlier session's copy: the host with the same certificate; without certificates,
// with the same address.
bool IsSameSource(const TargetSlot& slot, const ControlChannel& channel) {
  const std::string name = channel.peer_name();
  if (slot.peer_name != name) return false;
  return !name.empty() || AddressOf(slot.peer) == AddressOf(channel.peer());
}

// Who has it is said to whom it belongs, and to nobody else.
absl::Status Occupied(const TargetSlot& slot, const std::string& asks, absl::Duration kept) {
  const std::string whose = slot.peer_name == asks ? slot.peer : "another peer";
  const std::string stop = absl::StrCat("(presync stop ", slot.guest, ", on its source)");
  if (slot.busy) {
    return absl::AlreadyExistsError(absl::StrCat("guest ", slot.guest,
                                                 " is already being mirrored here, from ", whose,
                                                 "; stop that sync first ", stop));
  }
  return absl::AlreadyExistsError(absl::StrCat(
      "the memory of guest ", slot.guest, " is kept here for ", whose,
      ", which may come back, until ",
      absl::FormatTime("%H:%M:%S", ToWallTime(slot.lost_at + kept), absl::LocalTimeZone()),
      "; then it may come from elsewhere, or once that sync was stopped ", stop));
}

}  // namespace

// A guest that was told to run has written the memory, whatever a note says.
void TargetService::TakeKept() {
  std::vector<std::string> unreadable;
  const std::vector<HandoverEntry> entries =
      HandoverRecord::ReadAll(options_.record_folder, &unreadable);
  const auto never_ran = [&entries](const CopyOwner& owner) {
    return std::none_of(entries.begin(), entries.end(), [&owner](const HandoverEntry& entry) {
      return entry.role == HandoverRole::kTarget && entry.session == owner.session &&
             entry.phase != HandoverPhase::kWaiting && entry.phase != HandoverPhase::kNeverRan;
    });
  };
  std::vector<KeptPlace> all = host_->TakeKept(never_ran);
  MutexLock lock(&mutex_);
  for (KeptPlace& kept : all) {
    TargetSlot& slot = slots_.emplace_back();
    slot.session = kept.owner.session;
    slot.guest = kept.owner.guest;
    slot.peer = kept.owner.peer;
    slot.peer_name = kept.owner.peer_name;
    slot.memory_bytes = PagesToBytes(kept.place->memory().pages());
    slot.state = "lost";
    slot.place = std::move(kept.place);
    slot.reserved = slot.content_kept = slot.noted = true;
    slot.lost_at = MonotonicNow();
    Log(false,
        absl::StrCat(
            slot.guest, ": its copy of before the restart is kept for ", slot.peer, ", until ",
            absl::FormatTime("%H:%M:%S", ToWallTime(slot.lost_at + options_.keep_lost_session),
                             absl::LocalTimeZone())));
  }
}

absl::StatusOr<TargetSlot*> TargetService::AcquireSlot(const SessionId& session,
                                                       const std::string& guest,
                                                       uint64_t memory_bytes,
                                                       ControlChannel* channel) {
  const std::string peer_name = channel->peer_name();
  // From its slot on the guest is this session's; until then recovery may be at its QEMU.
  const GuestClaims::Claim claim = options_.claims->Take(guest, kTakeOverTimeout);
  if (!claim.held()) {
    return absl::UnavailableError(absl::StrCat("an earlier handover of ", guest,
                                               " to this host is being looked at; try again"));
  }
  std::list<TargetSlot> replaced;  // a place may take its time to end: not under the lock
  MutexLock lock(&mutex_);
  const auto find = [&] {
    mutex_.AssertHeld();
    return std::find_if(slots_.begin(), slots_.end(),
                        [&](const TargetSlot& slot) { return slot.guest == guest; });
  };
  if (IsOthers(session, peer_name)) {
    return absl::PermissionDeniedError("this session was opened by another peer");
  }
  auto it = find();
  // Before anything is changed for it: who may not, ends and replaces nothing.
  const TargetSlot* same = it != slots_.end() ? &*it : nullptr;
  if (absl::Status s = CheckUse(same, guest, memory_bytes, peer_name); !s.ok()) return s;
  if (it != slots_.end() && it->session == session && it->busy) {
    if (it->channel != nullptr) it->channel->Shutdown();
    const auto let_go = [&] {
      mutex_.AssertHeld();
      return find() == slots_.end() || !find()->busy;
    };
    mutex_.AwaitWithTimeout(let_go, kTakeOverTimeout);
    it = find();
  }
  if (it != slots_.end() && it->closing) {
    const auto is_closed = [&] {
      mutex_.AssertHeld();
      return find() == slots_.end() || !find()->closing;
    };
    mutex_.AwaitWithTimeout(is_closed, kTakeOverTimeout);
    it = find();
  }
  if (it != slots_.end() && it->session != session && !it->busy) {
    // A lost session of the same guest: its source has begun anew, so nobody will come back for it.
    if (IsSameSource(*it, *channel)) {
      it->session = session;
      it->older_copy = true;
    } else if (it->peer_name.empty()) {  // without a certificate nobody has a name
      replaced.splice(replaced.end(), slots_, it);
      it = slots_.end();
    }
  }
  if (it != slots_.end() && (it->busy || it->session != session)) {
    return Occupied(*it, peer_name, options_.keep_lost_session);
  }
  TargetSlot& slot = it != slots_.end() ? *it : slots_.emplace_back();
  slot.session = session;
  slot.guest = guest;
  slot.peer_name = peer_name;
  slot.memory_bytes = memory_bytes;
  slot.peer = channel->peer();
  slot.state = "mirroring";
  slot.channel = channel;
  slot.busy = true;
  slot.lost_at = absl::InfiniteFuture();
  return &slot;
}

bool TargetService::IsOthers(const SessionId& session, const std::string& peer_name) const {
  return std::any_of(slots_.begin(), slots_.end(), [&](const TargetSlot& slot) {
    return slot.session == session && slot.peer_name != peer_name;
  });
}

absl::Status TargetService::CheckUse(const TargetSlot* except, const std::string& guest,
                                     uint64_t memory_bytes, const std::string& peer_name) const {
  PeerUse all, own;
  for (const TargetSlot& slot : slots_) {
    if (&slot == except) continue;
    for (PeerUse* use : {&all, &own}) {
      if (use == &own && slot.peer_name != peer_name) continue;
      ++use->guests;
      use->memory_bytes += slot.memory_bytes;
    }
  }
  absl::Status status = CheckRules(options_.everyone, all, guest, memory_bytes, "all peers");
  const PeerRules* rules = peer_name.empty() ? nullptr : FindRules(options_.peers, peer_name);
  if (rules != nullptr) {
    status.Update(CheckRules(*rules, own, guest, memory_bytes, peer_name));
  }
  return status;
}

void TargetService::ReleaseSlot(TargetSlot* slot, bool forget) {
  if (forget || slot->place == nullptr) {
    EndSlot(slot);
    return;
  }
  MutexLock lock(&mutex_);
  slot->busy = false;
  slot->channel = nullptr;
  slot->lost_at = MonotonicNow();
  slot->state = "lost";
}

// A place may take its time to end, so not under the lock; and before the guest's name is free, for
// a new place would use the same files.
void TargetService::EndSlot(TargetSlot* slot) {
  {
    MutexLock lock(&mutex_);
    slot->closing = true;
    slot->channel = nullptr;
  }
  slot->place.reset();
  MutexLock lock(&mutex_);
  slots_.remove_if([slot](const TargetSlot& each) { return &each == slot; });
}

void TargetService::SetSlotState(TargetSlot* slot, const std::string& state) {
  MutexLock lock(&mutex_);
  slot->state = state;
}

}  // namespace presync
