// The target's side of a handover, and of comparisons by hash.
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <string>
#include <utility>

#include "absl/strings/str_cat.h"
#include "transport/clock.h"
#include "transport/printable.h"
#include "transport/sync/conversation.h"
#include "transport/sync/departures.h"
#include "transport/sync/page_hash.h"
#include "transport/sync/target_conversation.h"

namespace presync {
namespace {

using Body = wire::ControlMessage;

constexpr size_t kMaxHashReplyBytes = 512 << 10;

// Writes all of `bytes` to a pipe or socket whose reader is a loading guest.
absl::Status WriteAll(int fd, absl::string_view bytes, absl::Time deadline) {
  while (!bytes.empty()) {
    const ssize_t n = ::write(fd, bytes.data(), bytes.size());
    if (n > 0) {
      bytes.remove_prefix(static_cast<size_t>(n));
      continue;
    }
    if (errno == EINTR) continue;
    if (errno == EPIPE || errno == ECONNRESET) {
      return absl::UnavailableError("the waiting guest ended while it took its device state");
    }
    if (errno != EAGAIN) {
      return absl::UnavailableError(
          absl::StrCat("the waiting guest does not take its device state: ", std::strerror(errno)));
    }
    const int64_t left_ms = absl::ToInt64Milliseconds(deadline - MonotonicNow());
    pollfd p = {.fd = fd, .events = POLLOUT, .revents = 0};
    if (left_ms <= 0 || ::poll(&p, 1, static_cast<int>(left_ms)) <= 0) {
      return absl::DeadlineExceededError("the waiting guest does not take its device state");
    }
  }
  return absl::OkStatus();
}

}  // namespace

absl::Status TargetConversation::BeginHandover() {
  if (guest_ != nullptr) return absl::FailedPreconditionError("a handover is already under way");
  absl::StatusOr<TargetGuest*> guest = slot_->place->Waiting(MonotonicNow() + kGuestTimeout);
  if (!guest.ok()) return guest.status();
  if (absl::Status s = LookAtCopy(); !s.ok()) return s;
  // Without it a later presyncd could not tell whether this very guest has ended.
  const std::string process = slot_->place->process();
  if (process.empty()) {
    return absl::FailedPreconditionError(
        "which process waits for the guest can't be told, so a restart of this presyncd could not "
        "find it again");
  }
  record_->set_process(process);
  if (absl::Status s = record_->Append(HandoverPhase::kWaiting); !s.ok()) return s;
  guest_ = *guest;
  guest_->OnReturn([this](absl::string_view bytes) {
    Body back;
    back.mutable_state_return()->set_data(bytes.data(), bytes.size());
    Send(back).IgnoreError();  // a source that is gone is noticed by whoever waits for it
  });
  absl::StatusOr<UniqueFd> stream = (*guest)->BeginLoad(MonotonicNow() + kGuestTimeout);
  if (!stream.ok()) return stream.status();
  state_stream_ = *std::move(stream);
  ::fcntl(state_stream_.get(), F_SETFL, ::fcntl(state_stream_.get(), F_GETFL) | O_NONBLOCK);
  service_->SetSlotState(slot_, "handover");
  Body ready;
  ready.mutable_handover_ready();
  return Send(ready);
}

// Live state is loaded as it comes; staged state waits, for loading it reads guest RAM.
absl::Status TargetConversation::TakeState(const wire::StateChunk& chunk) {
  if (guest_ == nullptr || loading_) {
    return absl::InvalidArgumentError("device state came outside a handover");
  }
  state_bytes_ += chunk.data().size();
  if (chunk.staged() || !staged_.empty()) {
    if (absl::Status s = staged_share_.Take(chunk.data().size()); !s.ok()) return s;
    staged_ += chunk.data();
    return absl::OkStatus();
  }
  return WithLastWords(WriteAll(state_stream_.get(), chunk.data(), MonotonicNow() + kGuestTimeout));
}

// A QEMU that can't load a state says why in its log, and ends.
absl::Status TargetConversation::WithLastWords(absl::Status status) {
  if (status.ok()) return status;
  const std::string words = PrintableText(slot_->place->LastWords());
  if (words.empty()) return status;
  return absl::Status(status.code(),
                      absl::StrCat(status.message(), "; QEMU's last words: ", words));
}

absl::Status TargetConversation::AnswerHashes(const wire::HashRequest& request) {
  HashPlan plan = {.run = {request.first_page(), request.pages()},
                   .pages_per_hash = std::max(1u, request.pages_per_hash()),
                   .only = {request.only().begin(), request.only().end()}};
  if (plan.hashes() * kHashBytes > kMaxHashReplyBytes) {
    return absl::InvalidArgumentError("too many hashes were asked for at once");
  }
  // In a thread of its own, so that the device state can be loaded meanwhile; one at a time.
  FinishHashing();
  hasher_ = std::thread([this, plan = std::move(plan), id = request.id()] {
    absl::StatusOr<std::string> hashes = HashPages(slot_->place->memory(), plan);
    Body reply;
    if (hashes.ok()) {
      reply.mutable_hash_reply()->set_id(id);
      reply.mutable_hash_reply()->set_first_page(plan.run.first);
      *reply.mutable_hash_reply()->mutable_hashes() = *std::move(hashes);
    } else {
      reply = MakeRefused(hashes.status());
    }
    Send(reply).IgnoreError();  // the receiving side notices a connection that is gone
  });
  return absl::OkStatus();
}

void TargetConversation::FinishHashing() {
  if (hasher_.joinable()) hasher_.join();
}

absl::Status TargetConversation::Load(const wire::Load& load) {
  if (guest_ == nullptr || loading_ || load.state_bytes() != state_bytes_) {
    return absl::InvalidArgumentError("the order to load does not match the device state received");
  }
  // Nothing of the network's may touch the guest's memory from here on.
  if (absl::Status s = links_->CloseAll(); !s.ok()) return s;
  if (absl::Status s = LookAtCopy(); !s.ok()) return s;
  if (absl::Status s = CheckMemory(); !s.ok()) return s;
  // Loading writes it: from here on it is no copy, whatever becomes of this presyncd.
  if (absl::Status s = slot_->place->ForgetCopy(); !s.ok()) return s;
  loading_ = true;
  slot_->content_kept = slot_->noted = false;
  const absl::Time deadline = MonotonicNow() + kGuestTimeout;
  if (absl::Status s = guest_->StayPaused(deadline); !s.ok()) return s;
  if (absl::Status s = WriteAll(state_stream_.get(), staged_, deadline); !s.ok()) {
    return WithLastWords(std::move(s));
  }
  std::string().swap(staged_);
  staged_share_.GiveBack();
  state_stream_.reset();
  if (absl::Status s = guest_->AwaitLoaded(deadline); !s.ok()) {
    // The source goes on as soon as it hears of it: what ran here must have ended by then.
    if (guest_->HasRun()) AbortHandover(/*source_has_it=*/true);
    return WithLastWords(std::move(s));
  }
  loaded_ = true;
  Body loaded;
  loaded.mutable_loaded();
  return Send(loaded);
}

// The source has given the guest up. From the record on it is this host's.
absl::Status TargetConversation::RunGuest() {
  if (!loaded_)
    return absl::InvalidArgumentError("the order to run came before everything was loaded");
  FinishHashing();
  if (absl::Status s = CheckMemory(); !s.ok()) return s;
  if (absl::Status s = record_->Append(HandoverPhase::kToldToRun); !s.ok()) return s;
  const absl::Time deadline = MonotonicNow() + kGuestTimeout;
  absl::Status run = guest_->Run(deadline);
  Body answer;
  if (run.ok()) {
    answer.mutable_running();
    Send(answer).IgnoreError();  // if it is lost the source asks; the record knows
    slot_->place->Keep();
    const absl::Status here = ForgetDeparture(service_->options().record_folder, slot_->guest);
    if (!here.ok()) service_->Log(true, absl::StrCat(slot_->guest, ": ", here.message()));
    record_->Append(HandoverPhase::kRunning).IgnoreError();
    service_->Log(false, absl::StrCat(slot_->guest, ": runs here now"));
  } else if (absl::IsFailedPrecondition(run) && record_->Append(HandoverPhase::kWaiting).ok()) {
    // It refused, or had ended before. The order is taken back first: a record that still says so
    // when its QEMU is gone could not be settled without a person.
    if (guest_->HasRun()) {  // somebody else told it to
      AbortHandover(/*source_has_it=*/false);
      return absl::OkStatus();
    }
    if (absl::Status s = slot_->place->EndWaiting(); !s.ok()) return s;  // the source will ask
    // If this can't be written, the answer has to be enough: after it the source does not ask.
    record_->Append(HandoverPhase::kNeverRan).IgnoreError();
    answer.mutable_outcome()->set_value(wire::Outcome::NEVER_RAN);
    answer.mutable_outcome()->set_text(std::string(run.message()));
    Send(answer).IgnoreError();
    service_->Log(true, absl::StrCat(slot_->guest, ": could not be run: ", run.message()));
  } else {
    slot_->place->Keep();
    service_->Log(true, absl::StrCat(slot_->guest,
                                     ": was told to run, and whether it does is not "
                                     "known: ",
                                     run.message(), ". Look at ", slot_->place->address()));
  }
  forget_ = over_ = true;
  return absl::OkStatus();
}

// The waiting one has eaten a part of the state: a new one must wait. Only a process that is
// certainly gone, and was not seen to run, never ran; otherwise the record stays open, and Outcome
// decides. `source_has_it`: the source goes on with the guest, whatever happened here.
void TargetConversation::AbortHandover(bool source_has_it) {
  over_ = true;
  if (guest_ == nullptr) return;
  const bool ran = guest_->HasRun();
  guest_ = nullptr;
  if (ran) {
    record_->Append(HandoverPhase::kRanUntold).IgnoreError();
    service_->Log(true,
                  absl::StrCat(slot_->guest, ": SOMEBODY RAN IT HERE (", slot_->place->address(),
                               ") though presync did not tell it to run: its disks may have "
                               "been written to from here"));
    if (!source_has_it) {  // it may be the only one by now: a person has to look
      slot_->place->Keep();
      forget_ = true;
      return;
    }
  }
  const absl::Status ended = slot_->place->EndWaiting();
  if (!ended.ok()) {
    service_->Log(true, absl::StrCat(slot_->guest, ": ", ended.message()));
  } else if (!ran) {
    record_->Append(HandoverPhase::kNeverRan).IgnoreError();
  }
}

}  // namespace presync
