// The rules of recovery, record by record: docs/protocol.md, "After a crash".
#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "transport/printable.h"
#include "transport/sync/conversation.h"
#include "transport/sync/departures.h"
#include "transport/sync/recovery.h"

namespace presync {
namespace {

// Whether `other` is about a later handover of the same guest. Where an older presyncd wrote either
// nobody knows: then it is.
bool IsLater(const HandoverEntry& other, const HandoverEntry& entry) {
  if (other.guest != entry.guest) return false;
  if (other.session == entry.session && other.role == entry.role) return false;
  return other.sequence == 0 || entry.sequence == 0 || other.sequence > entry.sequence;
}

// Whether a later handover gave the guest up, or moved it: what stands at its address then is what
// that one left.
bool IsGone(const HandoverEntry& entry, const std::vector<HandoverEntry>& all) {
  return std::any_of(all.begin(), all.end(), [&](const HandoverEntry& other) {
    const bool gone =
        other.phase == HandoverPhase::kGivenUp || other.phase == HandoverPhase::kMoved;
    return gone && IsLater(other, entry);
  });
}

// Whether the guest came back to this host by a handover that is certainly later: then it ran where
// it was given up to.
bool CameBack(const HandoverEntry& entry, const std::vector<HandoverEntry>& all) {
  return std::any_of(all.begin(), all.end(), [&](const HandoverEntry& other) {
    const bool here =
        other.phase == HandoverPhase::kToldToRun || other.phase == HandoverPhase::kRunning;
    return here && other.guest == entry.guest && entry.sequence > 0 &&
           other.sequence > entry.sequence;
  });
}

absl::Status WaitForLater(OpenMatter* matter) {
  matter->advice = "a later handover of the same guest has to be settled first";
  return absl::FailedPreconditionError("a later handover of the guest is open");
}

std::string RanOrNot(const HandoverEntry& entry) {
  return absl::StrCat("then, if it ran here: ", SettleCommand(entry.guest, "ran"),
                      ". If it certainly never did, and its disks were not written to from here: ",
                      SettleCommand(entry.guest, "never-ran"));
}

}  // namespace

absl::Status Recovery::Append(const HandoverEntry& entry,
                              std::initializer_list<HandoverPhase> phases) {
  absl::StatusOr<HandoverRecord> record = HandoverRecord::Reserve(options_.folder, entry);
  if (!record.ok()) return record.status();
  for (const HandoverPhase phase : phases) {
    if (absl::Status s = record->Append(phase); !s.ok()) return s;
  }
  return absl::OkStatus();
}

bool Recovery::WasRefused(const std::string& path) const {
  MutexLock lock(&mutex_);
  const auto before = open_.find(path);
  return before != open_.end() && before->second.resume_refused;
}

// The guest was not given up, and somebody ran it at the target by hand.
absl::Status Recovery::RunsThereUntold(const HandoverEntry& entry, const wire::Outcome& outcome,
                                       OpenMatter* matter) {
  if (outcome.value() == wire::Outcome::RUNNING && entry.phase == HandoverPhase::kPreparing) {
    // A person said there that it is the one.
    const absl::Status moved = Append(entry, {HandoverPhase::kGivenUp, HandoverPhase::kMoved});
    if (!moved.ok()) return moved;
    matter->entry.phase = HandoverPhase::kMoved;
    return Moved(entry, matter);
  }
  matter->resume_refused = true;
  matter->for_a_person = true;
  matter->advice = SayThereWhoGoesOn(entry.guest);
  return absl::FailedPreconditionError(absl::StrCat(
      "it could not be resumed here, and ", entry.peer, " says: ", PrintableText(outcome.text())));
}

// The guest is this host's.
absl::Status Recovery::Resume(const HandoverEntry& entry, const Entries& all, OpenMatter* matter) {
  if (IsGone(entry, all)) return WaitForLater(matter);
  matter->advice =
      absl::StrCat("tried again until its QEMU (", entry.detail, ") answers or has ended");
  if (WasRefused(matter->path)) {
    const absl::StatusOr<wire::Outcome> outcome = host_->AskTarget(entry, false);
    if (outcome.ok() && RanUntold(*outcome)) return RunsThereUntold(entry, *outcome, matter);
  }
  const absl::Status resumed = host_->ResumeSource(entry);
  if (resumed.ok()) return HandoverRecord::Forget(options_.folder, entry);
  matter->resume_refused = absl::IsFailedPrecondition(resumed);
  return resumed;
}

absl::Status Recovery::Moved(const HandoverEntry& entry, OpenMatter* matter) {
  // Before its process ends, at which somebody may start it again.
  absl::Status quit = NoteDeparture(options_.folder, entry);
  if (quit.ok()) quit = host_->QuitSource(entry);
  if (!quit.ok()) {
    matter->for_a_person = absl::IsFailedPrecondition(quit);
    matter->advice =
        matter->for_a_person
            ? absl::StrCat(
                  "if it is the guest that moved, end it by hand at once; if it is another"
                  " one: ",
                  SettleCommand(entry.guest, "forget"))
            : "its old QEMU must not run: tried again until it has ended";
    return quit;
  }
  return HandoverRecord::Forget(options_.folder, entry);
}

absl::Status Recovery::TakeAnswer(const HandoverEntry& entry,
                                  const absl::StatusOr<wire::Outcome>& outcome, const Entries& all,
                                  OpenMatter* matter) {
  if (!outcome.ok()) {
    matter->advice = absl::StrCat(
        "asked again until the presyncd there answers: bring it back. If "
        "that host is lost for good, or its records are: ",
        LookAndSettle(entry.guest, entry.peer));
    return absl::Status(outcome.status().code(),
                        absl::StrCat("given up, and whether ", entry.peer,
                                     " runs it is not known: ", outcome.status().message()));
  }
  switch (outcome->value()) {
    case wire::Outcome::RUNNING:
      // Durable first: what the target said once need not be asked again.
      if (absl::Status s = Append(entry, {HandoverPhase::kMoved}); !s.ok()) return s;
      matter->entry.phase = HandoverPhase::kMoved;
      return Moved(entry, matter);
    case wire::Outcome::NEVER_RAN: {
      if (absl::Status s = Append(entry, {HandoverPhase::kTakenBack}); !s.ok()) return s;
      HandoverEntry back = entry;
      back.phase = matter->entry.phase = HandoverPhase::kTakenBack;
      return Resume(back, all, matter);
    }
    default:
      matter->for_a_person = true;
      matter->advice = LookAndSettle(entry.guest, entry.peer);
      return absl::FailedPreconditionError(
          absl::StrCat("given up, and ", entry.peer, " answers: ", PrintableText(outcome->text())));
  }
}

// Without asking: what is known of it stays as it was.
absl::Status Recovery::SettleGivenUp(const HandoverEntry& entry, const Entries& all,
                                     OpenMatter* matter) {
  if (CameBack(entry, all)) {
    if (absl::Status s = Append(entry, {HandoverPhase::kMoved}); !s.ok()) return s;
    matter->entry.phase = HandoverPhase::kMoved;
    return Moved(entry, matter);
  }
  const absl::Status still = host_->HoldSource(entry);
  {
    MutexLock lock(&mutex_);
    const auto before = open_.find(matter->path);
    if (before != open_.end() && before->second.entry.phase == entry.phase) {
      *matter = before->second;
      return absl::FailedPreconditionError(matter->known);
    }
  }
  matter->advice = absl::StrCat(entry.peer, " is being asked");
  return absl::IsAborted(still)
             ? still
             : absl::FailedPreconditionError(
                   absl::StrCat("given up, and whether ", entry.peer, " runs it is not known yet"));
}

absl::Status Recovery::SettleWaiting(const HandoverEntry& entry, OpenMatter* matter) {
  if (absl::Status s = host_->EndOrphan(entry); !s.ok()) {
    // Durable: whoever ends it by hand now does not make it one that never ran.
    if (absl::IsAlreadyExists(s)) {
      if (absl::Status noted = Append(entry, {HandoverPhase::kRanUntold}); !noted.ok())
        return noted;
      matter->entry.phase = HandoverPhase::kRanUntold;
      return SettleRanUntold(entry, matter);
    }
    matter->for_a_person = absl::IsFailedPrecondition(s);
    matter->advice =
        matter->for_a_person
            ? absl::StrCat("look whether ", entry.guest, " runs at ", entry.peer,
                           " too, and end one of the two at once; ", RanOrNot(entry))
            : absl::StrCat("tried again until its QEMU (", entry.detail, ") answers or has ended");
    return s;
  }
  return Append(entry, {HandoverPhase::kNeverRan});
}

absl::Status Recovery::SettleToldToRun(const HandoverEntry& entry, const Entries& all,
                                       OpenMatter* matter) {
  if (IsGone(entry, all)) return WaitForLater(matter);
  absl::Status run = host_->RunOrphan(entry);
  if (run.ok()) {
    if (absl::Status s = ForgetDeparture(options_.folder, entry.guest); !s.ok()) return s;
    return Append(entry, {HandoverPhase::kRunning});
  }
  if (absl::IsNotFound(run)) {
    matter->for_a_person = true;
    matter->advice = absl::StrCat(
        "the guest is this host's, and runs nowhere: start it from its disks as after a crash, "
        "then: ",
        SettleCommand(entry.guest, "ran"),
        ". If its disks were not written to from here since, it can go on at ", entry.peer,
        " instead: ", SettleCommand(entry.guest, "never-ran"));
  } else {
    matter->for_a_person = absl::IsFailedPrecondition(run);
    matter->advice = matter->for_a_person
                         ? absl::StrCat("look at it; ", RanOrNot(entry))
                         : absl::StrCat("the guest is this host's; tried again until its QEMU (",
                                        entry.detail, ") answers or has ended");
  }
  return run;
}

absl::Status Recovery::SettleRanUntold(const HandoverEntry& entry, OpenMatter* matter) {
  matter->for_a_person = true;
  matter->advice = absl::StrCat("look whether ", entry.guest, " runs at ", entry.peer,
                                " too, and end one of the two at once; ", RanOrNot(entry));
  return absl::FailedPreconditionError(
      absl::StrCat("somebody ran the guest here, at ", entry.detail,
                   ", though presync did not tell it to run, and its QEMU lives"));
}

absl::Status Recovery::Settle(const HandoverEntry& entry, const Entries& all, OpenMatter* matter) {
  switch (entry.phase) {
    case HandoverPhase::kPreparing:
    case HandoverPhase::kTakenBack:
      return Resume(entry, all, matter);
    case HandoverPhase::kGivenUp:
      return SettleGivenUp(entry, all, matter);
    case HandoverPhase::kMoved:
      return Moved(entry, matter);
    case HandoverPhase::kWaiting:
      return SettleWaiting(entry, matter);
    case HandoverPhase::kToldToRun:
      return SettleToldToRun(entry, all, matter);
    case HandoverPhase::kRanUntold:
      return SettleRanUntold(entry, matter);
    case HandoverPhase::kRunning:
    case HandoverPhase::kNeverRan:
      return absl::OkStatus();
  }
  return absl::OkStatus();
}

absl::Status Recovery::Apply(const HandoverEntry& entry, const Word& word, std::string* done) {
  switch (word.decision) {
    case Decision::kRunsHere:
      *done = absl::StrCat(entry.guest, " goes on here");
      return Append(entry, {HandoverPhase::kTakenBack});
    case Decision::kRunsThere:
      *done = absl::StrCat(entry.guest, " runs at ", entry.peer,
                           ", or wherever it moved on to: its QEMU here is ended");
      return Append(entry, {HandoverPhase::kMoved});
    case Decision::kForget:
      *done = absl::StrCat("the record of ", entry.guest, " is forgotten");
      return HandoverRecord::Forget(options_.folder, entry);
    case Decision::kRan:
    case Decision::kNeverRan:
      return ApplyAtTarget(entry, word, done);
  }
  return absl::OkStatus();
}

absl::Status Recovery::ApplyAtTarget(const HandoverEntry& entry, const Word& word,
                                     std::string* done) {
  const bool told = entry.phase == HandoverPhase::kToldToRun;
  if (word.decision == Decision::kRan) {
    *done =
        absl::StrCat(entry.guest, " is this host's: ", entry.peer, " ends its copy when it asks");
    if (absl::Status s = ForgetDeparture(options_.folder, entry.guest); !s.ok()) return s;
    if (told) return Append(entry, {HandoverPhase::kRunning});
    return Append(entry, {HandoverPhase::kToldToRun, HandoverPhase::kRunning});
  }
  if (entry.phase == HandoverPhase::kRanUntold && !word.force) {
    return absl::FailedPreconditionError(absl::StrCat(
        entry.guest, " was seen to run here, and may have written to its disks. With --force ",
        entry.peer, " goes on with its copy all the same"));
  }
  if (absl::Status s = host_->EndOrphan(entry); !s.ok()) {
    return absl::Status(s.code(), absl::StrCat(s.message(), "; end it first"));
  }
  *done = absl::StrCat(entry.guest, " never ran here, and never will: ", entry.peer,
                       " goes on with its copy when it asks");
  return told || entry.phase == HandoverPhase::kRanUntold
             ? Append(entry, {HandoverPhase::kWaiting, HandoverPhase::kNeverRan})
             : Append(entry, {HandoverPhase::kNeverRan});
}

}  // namespace presync
