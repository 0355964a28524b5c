// How a source's session hands its guest over, and what it does until the guest's fate is settled.
#include <string>
#include <thread>

#include "absl/strings/str_cat.h"
#include "transport/clock.h"
#include "transport/printable.h"
#include "transport/sync/conversation.h"
#include "transport/sync/departures.h"
#include "transport/sync/source_session.h"
#include "transport/wire/version.h"

namespace presync {
namespace {

constexpr absl::Duration kHoldEvery = absl::Seconds(1);

}  // namespace

// Ahead of any launch, which has to write it while it is timed.
absl::Status SourceSession::ReserveRecord() {
  if (record_ != nullptr) return absl::OkStatus();
  absl::StatusOr<HandoverRecord> record =
      HandoverRecord::Reserve(options_.record_folder, {.role = HandoverRole::kSource,
                                                       .phase = HandoverPhase::kPreparing,
                                                       .guest = options_.guest,
                                                       .session = id_,
                                                       .peer = dialer_->peer(),
                                                       .detail = options_.guest_address,
                                                       .process = options_.guest_process});
  if (!record.ok()) return record.status();
  record_ = std::make_unique<HandoverRecord>(*std::move(record));
  return absl::OkStatus();
}

// Nothing is open any more.
void SourceSession::RemoveRecord() {
  if (record_ != nullptr) record_->Remove().IgnoreError();
  record_.reset();
}

absl::Status SourceSession::CheckLaunchable() const {
  if (!connected_ || state_ != SessionState::kSyncing) {
    return absl::FailedPreconditionError(
        absl::StrCat("the link to ", dialer_->peer(), " is down: ", problem_));
  }
  return absl::OkStatus();
}

// Looks anew: what happened to the guest since the last look must not be found when it stands
// still.
absl::Status SourceSession::CheckGuest() {
  LookAtGuest(absl::Seconds(10));
  if (!outlook_.launchable.ok()) return outlook_.launchable;
  if (!shape_told_) {
    return absl::FailedPreconditionError(absl::StrCat(
        "the guest's devices, or its disks, changed a moment ago; whether ", dialer_->peer(),
        " still fits is found out first: try again when presync status says syncing"));
  }
  if (absl::Status s = CheckFit(); !s.ok()) return s;
  if (!unproven_again_) return absl::OkStatus();
  return absl::FailedPreconditionError(
      "something wrote the guest's memory unseen until a moment ago; all of the copy is compared "
      "again first: try again when presync status says syncing");
}

void SourceSession::Serve(LaunchOrder* order) {
  absl::Status fit = CheckLaunchable();
  if (fit.ok()) fit = CheckGuest();
  if (!fit.ok()) return Answer(order, fit);
  HandOver(order);
}

void SourceSession::HandOver(LaunchOrder* order) {
  order->options.verify |= outlook_.compare_all;
  comparisons_.Drop(absl::AbortedError("a launch ended it"));
  recording_.End("a launch ended it");
  log_->StopRecording();
  state_ = SessionState::kLaunching;
  EndReturn();
  Publish();
  absl::Status recorded = ReserveRecord();
  if (recorded.ok()) recorded = record_->Append(HandoverPhase::kPreparing);
  if (!recorded.ok()) {
    state_ = SessionState::kSyncing;
    if (guest_->managed() != nullptr)
      guest_->Resume(MonotonicNow() + absl::Seconds(30)).IgnoreError();
    Answer(order, recorded);
    return;
  }
  order->options.hash_id = connection_.version >= kHashesVersion ? comparisons_.NewHashId() : 0;
  HandoverEnd end = RunSourceHandover(connection_.channel.get(), sync_.get(), guest_.get(),
                                      *memory_, record_.get(), order->options, order->ordered_at);
  switch (end.result) {
    case HandoverResult::kMoved:
      Settle(SessionState::kMoved, absl::OkStatus());
      Answer(order, end.report);
      return;
    case HandoverResult::kInDoubt:
      sync_->DetachLink();
      connection_ = {};
      connected_ = false;
      problem_ = std::string(end.why.message());
      state_ = SessionState::kInDoubt;
      Publish();
      ResolveDoubt();
      break;
    case HandoverResult::kHere:
      RemoveRecord();
      LoseLink(end.why);
      break;
    case HandoverResult::kStuck:
      LoseLink(end.why);
      state_ = SessionState::kStuck;
      break;
  }
  Answer(order, state_ == SessionState::kMoved ? absl::StatusOr<HandoverReport>(end.report)
                                               : absl::StatusOr<HandoverReport>(end.why));
}

// Whoever resumed it, its manager or a person: it may run on the target.
void SourceSession::HoldStill() {
  const absl::Status still = guest_->HoldStill(MonotonicNow() + absl::Seconds(5));
  if (!still.ok()) options_.log(true, absl::StrCat(options_.guest, ": ", still.message()));
}

// A target that is mute keeps the question waiting for seconds; the guest is looked at each second
// all the same.
absl::StatusOr<wire::Outcome> SourceSession::AskAndHoldStill(bool end_it) {
  absl::StatusOr<wire::Outcome> outcome = absl::UnknownError("not asked");
  Mutex mutex;
  bool answered = false;
  std::thread asking([&] {
    outcome =
        AskOutcome(dialer_.get(), id_, options_.guest, end_it, MonotonicNow() + absl::Seconds(5));
    MutexLock lock(&mutex);
    answered = true;
  });
  bool waits = true;
  while (waits) {
    HoldStill();
    MutexLock lock(&mutex);
    const auto done = [&] { return answered; };
    waits = !mutex.AwaitWithTimeout(done, kHoldEvery);
  }
  asking.join();
  return outcome;
}

// Given up, and no answer: ask until there is one. Neither yes nor silence lets the guest run here;
// only the target's positive word that it never ran it, or a person's that does not contradict it.
void SourceSession::ResolveDoubt() {
  const std::optional<Word> word = PendingWord();
  const bool end_it = word && word->decision == Decision::kRunsHere;
  const absl::StatusOr<wire::Outcome> outcome = AskAndHoldStill(end_it);
  if (word) {
    const absl::Status taken = TakeWord(*word, outcome);
    if (state_ != SessionState::kInDoubt) return;
    AnswerWord(taken);
  }
  if (!outcome.ok()) {
    problem_ = absl::StrCat("given up to ", dialer_->peer(),
                            ", whose presyncd can't be asked: ", outcome.status().message(),
                            "; asked again every second. If that host is lost for good: ",
                            LookAndSettle(options_.guest, dialer_->peer()));
  } else if (outcome->value() == wire::Outcome::RUNNING) {
    return Settle(SessionState::kMoved, absl::OkStatus());
  } else if (outcome->value() == wire::Outcome::NEVER_RAN) {
    record_->Append(HandoverPhase::kTakenBack).IgnoreError();
    return ResumeHere(absl::StrCat(dialer_->peer(), " never ran the guest; it goes on here"));
  } else {
    problem_ = absl::StrCat("given up to ", dialer_->peer(),
                            ", which answers: ", PrintableText(outcome->text()), "; ",
                            LookAndSettle(options_.guest, dialer_->peer()));
  }
  Publish();
  WaitForOrder(options_.reconnect_every);
}

// Ok: it was acted upon, and the session is in doubt no longer.
absl::Status SourceSession::TakeWord(const Word& word,
                                     const absl::StatusOr<wire::Outcome>& outcome) {
  const std::string& peer = dialer_->peer();
  if (absl::Status s = CheckWord(options_.guest, peer, word, outcome); !s.ok()) return s;
  const bool here = word.decision == Decision::kRunsHere;
  // Durable first: without it the next presyncd would be in doubt again, with the guest running.
  if (here) {
    if (absl::Status s = record_->Append(HandoverPhase::kTakenBack); !s.ok()) return s;
  }
  options_.log(
      true, absl::StrCat(options_.guest, ": settled by hand: it runs ", here ? "here" : "there"));
  if (here) {
    ResumeHere("settled by hand; the guest goes on here");
  } else {
    Settle(SessionState::kMoved, absl::OkStatus());
  }
  return absl::OkStatus();
}

// Whether a guest that its process refused to run may be tried again (RanUntold). A target that
// can't be asked is not waited for: the guest is this host's.
bool SourceSession::MayRunHere() {
  if (!resume_refused_) return true;
  const absl::StatusOr<wire::Outcome> outcome =
      AskOutcome(dialer_.get(), id_, options_.guest, false, MonotonicNow() + absl::Seconds(5));
  if (!outcome.ok() || !RanUntold(*outcome)) return true;
  // A person said there that it is the one.
  if (outcome->value() == wire::Outcome::RUNNING && record_->Append(HandoverPhase::kGivenUp).ok()) {
    Settle(SessionState::kMoved, absl::OkStatus());
    return false;
  }
  problem_ = absl::StrCat("the guest could not be resumed here, and ", dialer_->peer(),
                          " says: ", PrintableText(outcome->text()), "; ",
                          SayThereWhoGoesOn(options_.guest));
  Publish();
  WaitForOrder(options_.reconnect_every);
  return false;
}

// The guest is this host's and stands still: tries until it runs, or its process has ended.
void SourceSession::ResumeHere(const std::string& why) {
  if (!MayRunHere()) return;
  const absl::Status resumed = guest_->Resume(MonotonicNow() + absl::Seconds(30));
  resume_refused_ = absl::IsFailedPrecondition(resumed);
  if (resumed.ok()) {
    RemoveRecord();
    state_ = SessionState::kConnecting;
    problem_ = why;
  } else if (absl::IsUnavailable(resumed)) {
    RemoveRecord();
    Settle(SessionState::kFailed, resumed);
    return;
  } else {
    state_ = SessionState::kStuck;
    problem_ = absl::StrCat("the guest is this host's and stands still: ", resumed.message());
  }
  Publish();
  WaitForOrder(options_.reconnect_every);
}

// The session is over. A guest that moved must not be left where somebody could let it run again.
void SourceSession::Settle(SessionState state, const absl::Status& why) {
  state_ = state;
  problem_ = std::string(why.message());
  if (state == SessionState::kMoved) {
    record_->Append(HandoverPhase::kMoved).IgnoreError();
    // Before its process ends, at which somebody may start it again.
    const absl::Status noted = NoteDeparture(options_.record_folder, record_->entry());
    if (!noted.ok()) options_.log(true, absl::StrCat(options_.guest, ": ", noted.message()));
    if (absl::Status s = guest_->Quit(MonotonicNow() + absl::Seconds(10)); !s.ok()) {
      problem_ = absl::StrCat("the guest has moved, but its old QEMU here did not quit (",
                              s.message(), "): end it by hand, and never resume it");
    } else if (noted.ok()) {
      RemoveRecord();
    }
  }
  Publish();
}

}  // namespace presync
