#include "transport/sync/source_handover.h"

#include <optional>

#include "absl/functional/function_ref.h"
#include "absl/strings/str_cat.h"
#include "transport/clock.h"
#include "transport/printable.h"
#include "transport/sync/conversation.h"
#include "transport/sync/guest_switchover.h"
#include "transport/sync/memory_comparison.h"
#include "transport/sync/page_hash.h"
#include "transport/sync/unsettled_comparison.h"

namespace presync {
namespace {

using Body = wire::ControlMessage;

// How long a round waits for the link before it goes on: while there is much to send, and once it
// only waits for the guest to stop and looks what was written meanwhile.
constexpr absl::Duration kBusyStep = absl::Milliseconds(1);
constexpr absl::Duration kRoundStep = absl::Milliseconds(4);

// How long a link that broke waits for the target's reason.
constexpr absl::Duration kReasonTimeout = absl::Milliseconds(200);

class Handover {
 public:
  Handover(ControlChannel* channel, SourceSync* sync, SourceGuest* guest, const GuestMemory& memory,
           HandoverRecord* record, const HandoverOptions& options, absl::Time ordered_at)
      : channel_(channel),
        sync_(sync),
        guest_(guest),
        memory_(memory),
        record_(record),
        options_(options),
        start_(ordered_at) {}

  HandoverEnd Run();

 private:
  absl::Status BeforeGivingUp();
  absl::Status Rounds(GuestSwitchover* guest);
  absl::Status Drain(const RequestLook& last_look);
  absl::Status Settle(const RequestLook& last_look);
  absl::Status AskAboutUnsettled();
  absl::Status Take(const Body& message);
  absl::Status TakeReturn(const Body& message);
  absl::Status TakeWhatCame();
  absl::Status TakeUntil(absl::FunctionRef<bool()> done);
  absl::Status LoadAndCompare(bool written_since_stop);
  absl::Status CountDiffering(const std::vector<PageRun>& ranges);
  HandoverEnd AfterGivingUp();
  absl::Status TargetsReason(absl::Status why);
  void TellAborted(const absl::Status& why);
  HandoverEnd CallOff(absl::Status why);
  HandoverEnd End(HandoverResult result, absl::Status why) {
    return {.result = result, .why = std::move(why), .report = report_};
  }

  absl::Status SendBody(const Body& message) { return channel_->Send(message, deadline_); }
  void Mark(absl::string_view step) {
    report_.steps.emplace_back(std::string(step), MonotonicNow() - start_);
  }

  ControlChannel* const channel_;
  SourceSync* const sync_;
  SourceGuest* const guest_;
  const GuestMemory& memory_;
  HandoverRecord* const record_;
  const HandoverOptions options_;
  const absl::Time start_;
  absl::Time stopped_at_;
  absl::Time deadline_;
  bool ready_ = false;   // the target has said so
  bool loaded_ = false;  // likewise
  absl::Status refusal_;
  std::optional<MemoryComparison> comparison_;
  std::optional<UnsettledComparison> unsettled_;
  HandoverReport report_;
};

HandoverEnd Handover::Run() {
  deadline_ = MonotonicNow() + options_.rounds_timeout;
  report_.managed = guest_->managed() != nullptr;
  const uint64_t wire_bytes_before = sync_->progress().wire_bytes;
  if (absl::Status s = BeforeGivingUp(); !s.ok()) return CallOff(std::move(s));
  report_.wire_bytes = sync_->progress().wire_bytes - wire_bytes_before;

  // From here on the guest is the target's, unless the target says that it never ran it. An append
  // that failed may be on disk all the same, but the target was not told: the guest is still ours.
  if (absl::Status s = record_->Append(HandoverPhase::kGivenUp); !s.ok()) {
    return CallOff(std::move(s));
  }
  Mark("given up");
  return AfterGivingUp();
}

absl::Status Handover::BeforeGivingUp() {
  Body begin;
  begin.mutable_begin_handover();
  if (absl::Status s = SendBody(begin); !s.ok()) return s;
  sync_->NoteWrites();
  if (options_.hash_id != 0) {
    unsettled_.emplace(&memory_, sync_, options_.hash_id);
    if (absl::Status s = AskAboutUnsettled(); !s.ok()) return s;
  }
  if (options_.verify) {
    comparison_.emplace(&memory_, sync_);
    if (absl::Status s = SendBody(comparison_->HashAhead()); !s.ok()) return s;
  }
  {
    GuestSwitchover guest(guest_, channel_, deadline_, options_.switchover_timeout);
    if (absl::Status s = Rounds(&guest); !s.ok()) return s;
    if (!guest.stopped_at()) return guest.Finish().status();
    stopped_at_ = *guest.stopped_at();
    deadline_ = MonotonicNow() + options_.switchover_timeout;
    Mark("stopped");
    if (comparison_) comparison_->OnGuestStopped();
    // The residual travels while the device state is saved.
    const absl::Status drained = Drain(guest.last_look());
    absl::StatusOr<uint64_t> state_bytes = guest.Finish();
    if (!state_bytes.ok()) return state_bytes.status();
    if (!drained.ok()) return drained;
    report_.state_bytes = *state_bytes;
    Mark("state saved");
  }
  // Device code may have written guest RAM while its state was saved.
  const uint64_t writes_before = sync_->progress().write_faults;
  if (absl::Status s = sync_->Scan(); !s.ok()) return s;
  const bool written = sync_->progress().write_faults != writes_before;
  if (absl::Status s = sync_->Flush(deadline_); !s.ok()) return s;
  Mark("last scan");
  if (absl::Status s = LoadAndCompare(written); !s.ok()) return s;
  if (absl::Status s = memory_.Check(); !s.ok()) return s;  // zeros may have been sent for it
  return guest_->StandsStill(deadline_);
}

// Sends what is stale, again and again, while the guest runs. The guest is told to stop when the
// target is ready and little enough is left or another round would not make it less; sending goes
// on until it stands still.
absl::Status Handover::Rounds(GuestSwitchover* guest) {
  if (absl::Status s = sync_->Scan(); !s.ok()) return s;
  report_.residual_at_launch = sync_->residual();
  const uint64_t free_bytes =
      static_cast<uint64_t>(static_cast<double>(sync_->link_bytes_per_s()) *
                            absl::ToDoubleSeconds(options_.overlapped_transfer));
  const auto little = [&] { return PagesToBytes(sync_->unsent()) <= free_bytes; };
  // Its manager has told it to stop already: there is nothing to wait for.
  const bool managed = guest_->managed() != nullptr;
  PageCount before = UINT32_MAX;
  const auto target_ready = [&] {
    return ready_ && !(comparison_ && comparison_->awaits_reply()) &&
           !(unsettled_ && !unsettled_->done());
  };
  bool gone = false;
  while (!guest->stopped()) {
    if (MonotonicNow() >= deadline_) {
      return absl::DeadlineExceededError(target_ready() ? "the memory could not be sent in time"
                                                        : "the target did not get ready in time");
    }
    if (absl::Status s = TakeWhatCame(); !s.ok()) return s;
    if (absl::Status s = sync_->PushAll(); !s.ok()) return s;
    if (managed || little()) {  // what was known is nearly out: look again
      if (absl::Status s = sync_->Scan(); !s.ok()) return s;
      if (absl::Status s = sync_->PushAll(); !s.ok()) return s;
      ++report_.rounds;
      const PageCount unsent = sync_->unsent();
      if (target_ready() && (managed || little() || unsent >= before - before / 4)) {
        if (!gone) Mark("told to stop");
        gone = true;
        guest->Go();
      }
      before = unsent;
    }
    const absl::Duration step = gone ? kRoundStep : kBusyStep;
    if (absl::Status s = sync_->AwaitLink(MonotonicNow() + step); !s.ok()) return s;
  }
  return absl::OkStatus();
}

// The next question, if there is one and none is open.
absl::Status Handover::AskAboutUnsettled() {
  return unsettled_->Step([this](const Body& message) { return SendBody(message); });
}

// The guest stands still, and so do its devices: whatever is left goes over, and is confirmed.
absl::Status Handover::Drain(const RequestLook& last_look) {
  sync_->OnDrained();
  if (absl::Status s = sync_->Scan(); !s.ok()) return s;
  report_.residual_at_stop = sync_->residual();
  if (absl::Status s = sync_->PushAll(); !s.ok()) return s;
  if (absl::Status s = sync_->FindDiscarded(); !s.ok()) return s;
  return Settle(last_look);
}

// What was read while a device may have been filling it is compared, and sent again where that is
// so. Only now: a request that is in flight can still change it.
absl::Status Handover::Settle(const RequestLook& last_look) {
  PageBitmap pages = sync_->UnsettledAtStandstill(last_look);
  report_.unsettled_pages = pages.count();
  if (unsettled_) unsettled_->OnStandstill(std::move(pages));
  if (absl::Status s = sync_->Flush(deadline_); !s.ok()) return s;
  Mark("residual confirmed");
  const absl::Time confirmed = MonotonicNow();
  std::vector<PageRun> differing;
  if (unsettled_) {
    unsettled_->AskForTheRest();
    if (absl::Status s = AskAboutUnsettled(); !s.ok()) return s;
    if (absl::Status s = TakeUntil([&] { return unsettled_->done(); }); !s.ok()) return s;
    differing = unsettled_->Differing();
  } else {
    pages.AppendRunsWithin({0, memory_.pages()}, &differing);
  }
  report_.unsettled_differing = CountPages(differing);
  if (!differing.empty()) {
    sync_->Distrust(differing);
    if (absl::Status s = sync_->Flush(deadline_); !s.ok()) return s;
  }
  report_.unsettled_took = MonotonicNow() - confirmed;
  Mark("unsettled compared");
  return absl::OkStatus();
}

// Takes note of one message; only those that the target may send before it is told to run the
// guest.
absl::Status Handover::Take(const Body& message) {
  if (unsettled_ && message.body_case() == Body::kHashReply &&
      message.hash_reply().id() == options_.hash_id) {
    if (absl::Status s = unsettled_->OnReply(message.hash_reply()); !s.ok()) return s;
    return AskAboutUnsettled();
  }
  if (IsAside(message)) return absl::OkStatus();
  switch (message.body_case()) {
    case Body::kHandoverReady:
      ready_ = true;
      Mark("target ready");
      return absl::OkStatus();
    case Body::kHashReply:
      if (!comparison_) break;
      return comparison_->OnReply(message.hash_reply());
    case Body::kStateReturn:
      return TakeReturn(message);
    case Body::kLoaded:
      loaded_ = true;
      Mark("loaded on target");
      return absl::OkStatus();
    case Body::kRefused:
      refusal_ = RefusedStatus(message.refused(), channel_->peer());
      return refusal_;
    default:
      break;
  }
  return absl::InvalidArgumentError(
      absl::StrCat(channel_->peer(), " sent message ", message.body_case(), " in a handover"));
}

absl::Status Handover::TakeReturn(const Body& message) {
  ManagedLaunch* managed = guest_->managed();
  if (managed == nullptr) return absl::InvalidArgumentError("this guest takes no answer");
  return managed->TakeReturn(message.state_return().data());
}

// Takes note of what has come, without waiting.
absl::Status Handover::TakeWhatCame() {
  while (true) {
    absl::StatusOr<Body> message = channel_->Receive(MonotonicNow());
    if (absl::IsDeadlineExceeded(message.status())) return absl::OkStatus();
    if (!message.ok()) return message.status();
    if (absl::Status s = Take(*message); !s.ok()) return s;
  }
}

absl::Status Handover::TakeUntil(absl::FunctionRef<bool()> done) {
  while (!done()) {
    absl::StatusOr<Body> message = channel_->Receive(deadline_);
    if (!message.ok()) return message.status();
    if (absl::Status s = Take(*message); !s.ok()) return s;
  }
  return absl::OkStatus();
}

// What the target was sent since it hashed ahead it hashes again while it loads the device state.
absl::Status Handover::LoadAndCompare(bool written_since_stop) {
  if (comparison_) {
    if (written_since_stop) comparison_->OnWrittenSinceStop();
    if (const std::optional<Body> again = comparison_->HashAgain()) {
      if (absl::Status s = SendBody(*again); !s.ok()) return s;
    }
  }
  Body load;
  load.mutable_load()->set_state_bytes(report_.state_bytes);
  if (absl::Status s = SendBody(load); !s.ok()) return s;
  const auto done = [&] { return loaded_ && !(comparison_ && comparison_->awaits_reply()); };
  if (absl::Status s = TakeUntil(done); !s.ok()) return s;
  if (!comparison_) return absl::OkStatus();
  const absl::StatusOr<std::vector<PageRun>> differing = comparison_->Differing();
  if (!differing.ok()) return differing.status();
  report_.pages_compared = memory_.pages();
  Mark("compared");
  return differing->empty() ? absl::OkStatus() : CountDiffering(*differing);
}

// Asks for the pages of `ranges` one by one.
absl::Status Handover::CountDiffering(const std::vector<PageRun>& ranges) {
  std::string first_pages;
  for (const PageRun& range : ranges) {
    const HashPlan plan = {.run = range, .pages_per_hash = 1, .only = {}};
    if (absl::Status s = SendBody(MakeHashRequest(plan)); !s.ok()) return s;
    const absl::StatusOr<std::string> ours = HashPages(memory_, plan);
    if (!ours.ok()) return ours.status();
    absl::StatusOr<Body> reply = Expect(channel_, Body::kHashReply, deadline_);
    if (!reply.ok()) return reply.status();
    if (absl::Status s = CheckHashReply(reply->hash_reply(), plan); !s.ok()) return s;
    for (const PageRun& page : DifferingRanges(plan, *ours, reply->hash_reply().hashes())) {
      if (++report_.pages_differing <= 8) absl::StrAppend(&first_pages, " ", page.first);
    }
  }
  return absl::DataLossError(absl::StrCat(
      report_.pages_differing, " pages differ on the target (first:", first_pages,
      "): something writes guest memory that dirty tracking does not see, or presync is at fault; "
      "the guest stays here. Keep the logs of both presyncd and report it"));
}

HandoverEnd Handover::AfterGivingUp() {
  deadline_ = MonotonicNow() + options_.switchover_timeout;
  Body run;
  run.mutable_run();
  absl::Status sent = SendBody(run);
  if (!sent.ok()) return End(HandoverResult::kInDoubt, std::move(sent));
  absl::StatusOr<Body> answer = channel_->Receive(deadline_);
  while (answer.ok() && (IsAside(*answer) || answer->body_case() == Body::kStateReturn)) {
    // A process here that is gone does not change whose the guest is.
    if (!IsAside(*answer)) TakeReturn(*answer).IgnoreError();
    answer = channel_->Receive(deadline_);
  }
  if (!answer.ok()) return End(HandoverResult::kInDoubt, answer.status());

  const bool never_ran = answer->body_case() == Body::kOutcome &&
                         answer->outcome().value() == wire::Outcome::NEVER_RAN;
  if (never_ran) {
    record_->Append(HandoverPhase::kTakenBack).IgnoreError();  // without it, recovery asks again
    return CallOff(absl::AbortedError(absl::StrCat(
        channel_->peer(), " could not run the guest: ", PrintableText(answer->outcome().text()))));
  }
  if (answer->body_case() != Body::kRunning) {
    return End(
        HandoverResult::kInDoubt,
        absl::InvalidArgumentError(absl::StrCat(
            channel_->peer(), " answered the order to run with message ", answer->body_case())));
  }
  report_.launch = MonotonicNow() - start_;
  report_.downtime = MonotonicNow() - stopped_at_;
  Mark("running on target");
  return End(HandoverResult::kMoved, absl::OkStatus());
}

// A target that refuses says why on the control connection, and then its end of the page link is
// gone too; whichever is noticed first.
absl::Status Handover::TargetsReason(absl::Status why) {
  if (!absl::IsUnavailable(why)) return why;
  deadline_ = MonotonicNow() + kReasonTimeout;
  (void)TakeUntil([&] { return !refusal_.ok(); });
  return refusal_.ok() ? why : refusal_;
}

void Handover::TellAborted(const absl::Status& why) {
  Body abort;
  abort.mutable_abort_handover()->set_reason(std::string(why.message()));
  channel_->Send(abort, MonotonicNow() + absl::Seconds(1)).IgnoreError();
}

// Gives the guest back to its vCPUs first, then tells the target. But a manager resumes its guest
// when the process on the target has failed, and not before.
HandoverEnd Handover::CallOff(absl::Status why) {
  const bool managed = guest_->managed() != nullptr;
  if (managed) {
    why = TargetsReason(std::move(why));
    TellAborted(why);
  }
  const absl::Status resumed = guest_->Resume(MonotonicNow() + absl::Seconds(30));
  Mark("called off");
  if (!managed) why = TargetsReason(std::move(why));
  if (!resumed.ok()) {
    why = absl::Status(why.code(), absl::StrCat(why.message(),
                                                "; and then the guest could not be "
                                                "resumed here: ",
                                                resumed.message()));
  }
  if (!managed) TellAborted(why);
  return End(resumed.ok() ? HandoverResult::kHere : HandoverResult::kStuck, std::move(why));
}

}  // namespace

HandoverEnd RunSourceHandover(ControlChannel* channel, SourceSync* sync, SourceGuest* guest,
                              const GuestMemory& memory, HandoverRecord* record,
                              const HandoverOptions& options, absl::Time ordered_at) {
  return Handover(channel, sync, guest, memory, record, options, ordered_at).Run();
}

}  // namespace presync
