#include "transport/sync/recovery.h"

#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "transport/sync/conversation.h"

namespace presync {
namespace {

std::string Command(const std::string& guest, absl::string_view how) {
  return absl::StrCat("presync settle ", guest, " ", how);
}

// A person has to look at both hosts; then one of two commands fits.
std::string LookAndSettle(const HandoverEntry& entry) {
  return absl::StrCat("look at ", entry.peer, " whether ", entry.guest,
                      " runs there. If it does: ", Command(entry.guest, "there"),
                      ". If it certainly does not, and never will: ", Command(entry.guest, "here"));
}

}  // namespace

std::string MatterText(const OpenMatter& matter) {
  const HandoverEntry& entry = matter.entry;
  if (entry.guest.empty()) return absl::StrCat(matter.known, "; ", matter.advice);
  return absl::StrCat(entry.guest, ": an earlier presyncd left it ", PhaseName(entry.phase), " (",
                      entry.role == HandoverRole::kSource ? "source" : "target", ", peer ",
                      entry.peer, "): ", matter.known, "; ", matter.advice);
}

Recovery::Recovery(Options options, RecoveryHost* host)
    : options_(std::move(options)), host_(host) {}

std::vector<OpenMatter> Recovery::open() const {
  MutexLock lock(&mutex_);
  return open_;
}

absl::Status Recovery::Append(const HandoverEntry& entry, HandoverPhase phase) {
  absl::StatusOr<HandoverRecord> record = HandoverRecord::Reserve(options_.folder, entry);
  return record.ok() ? record->Append(phase) : record.status();
}

// The guest is this host's. Not while another record says that it moved away since, or may have:
// what stands at this address then is what that handover left.
absl::Status Recovery::Resume(const HandoverEntry& entry, OpenMatter* matter) {
  if (gone_.contains(entry.guest)) {
    matter->advice = "a later handover of the same guest has to be settled first";
    return absl::FailedPreconditionError("a later handover of the guest is open");
  }
  matter->advice =
      absl::StrCat("tried again until its QEMU (", entry.detail, ") answers or has ended");
  if (absl::Status s = host_->ResumeSource(entry); !s.ok()) return s;
  return HandoverRecord::Forget(options_.folder, entry);
}

absl::Status Recovery::Moved(const HandoverEntry& entry, OpenMatter* matter) {
  absl::Status quit = host_->QuitSource(entry);
  if (!quit.ok()) {
    matter->for_a_person = absl::IsFailedPrecondition(quit);
    matter->advice =
        matter->for_a_person
            ? absl::StrCat(
                  "if it is the guest that moved, end it by hand at once; if it is another"
                  " one: ",
                  Command(entry.guest, "forget"))
            : "its old QEMU must not run: tried again until it has ended";
    return quit;
  }
  return HandoverRecord::Forget(options_.folder, entry);
}

absl::Status Recovery::SettleGivenUp(const HandoverEntry& entry, OpenMatter* matter) {
  const absl::StatusOr<wire::Outcome> outcome = host_->AskTarget(entry);
  if (!outcome.ok()) {
    matter->advice = absl::StrCat(
        "asked again until the presyncd there answers: bring it back. If "
        "that host is lost for good, or its records are: ",
        LookAndSettle(entry));
    return absl::Status(outcome.status().code(),
                        absl::StrCat("given up, and whether ", entry.peer,
                                     " runs it is not known: ", outcome.status().message()));
  }
  switch (outcome->value()) {
    case wire::Outcome::RUNNING: {
      // Durable first: what the target said once need not be asked again.
      if (absl::Status s = Append(entry, HandoverPhase::kMoved); !s.ok()) return s;
      return Moved(entry, matter);
    }
    case wire::Outcome::NEVER_RAN: {
      if (absl::Status s = Append(entry, HandoverPhase::kTakenBack); !s.ok()) return s;
      gone_.erase(entry.guest);
      return Resume(entry, matter);
    }
    default:
      matter->for_a_person = true;
      matter->advice = LookAndSettle(entry);
      return absl::FailedPreconditionError(
          absl::StrCat("given up, and ", entry.peer, " answers: ", PrintableText(outcome->text())));
  }
}

absl::Status Recovery::SettleWaiting(const HandoverEntry& entry, OpenMatter* matter) {
  if (absl::Status s = host_->EndOrphan(entry.detail); !s.ok()) {
    matter->for_a_person = absl::IsFailedPrecondition(s);
    matter->advice =
        matter->for_a_person
            ? absl::StrCat(
                  "look whether ", entry.guest, " runs at ", entry.peer,
                  " too, and end one of the two at once; then: ", Command(entry.guest, "forget"))
            : absl::StrCat("tried again until its QEMU (", entry.detail, ") answers or has ended");
    return s;
  }
  return Append(entry, HandoverPhase::kNeverRan);
}

absl::Status Recovery::SettleToldToRun(const HandoverEntry& entry, OpenMatter* matter) {
  if (gone_.contains(entry.guest)) {
    matter->advice = "a later handover of the same guest has to be settled first";
    return absl::FailedPreconditionError("a later handover of the guest is open");
  }
  absl::Status run = host_->RunOrphan(entry.detail);
  if (run.ok()) return Append(entry, HandoverPhase::kRunning);
  if (absl::IsNotFound(run)) {
    matter->for_a_person = true;
    matter->advice = absl::StrCat(
        "the guest is this host's, and runs nowhere: start it from its disks as after a crash, "
        "then: ",
        Command(entry.guest, "forget"));
  } else {
    matter->advice = absl::StrCat("the guest is this host's; tried again until its QEMU (",
                                  entry.detail, ") answers or has ended");
  }
  return run;
}

absl::Status Recovery::Settle(const HandoverEntry& entry, OpenMatter* matter) {
  switch (entry.phase) {
    case HandoverPhase::kPreparing:
    case HandoverPhase::kTakenBack:
      return Resume(entry, matter);
    case HandoverPhase::kGivenUp:
      return SettleGivenUp(entry, matter);
    case HandoverPhase::kMoved:
      return Moved(entry, matter);
    case HandoverPhase::kWaiting:
      return SettleWaiting(entry, matter);
    case HandoverPhase::kToldToRun:
      return SettleToldToRun(entry, matter);
    case HandoverPhase::kRunning:
    case HandoverPhase::kNeverRan:
      return absl::OkStatus();
  }
  return absl::OkStatus();
}

void Recovery::Pass(const InUse& in_use) {
  MutexLock pass(&pass_mutex_);
  std::vector<std::string> unreadable;
  std::vector<HandoverEntry> entries = HandoverRecord::ReadAll(options_.folder, &unreadable);
  gone_.clear();
  for (const HandoverEntry& entry : entries) {
    if (entry.phase == HandoverPhase::kGivenUp || entry.phase == HandoverPhase::kMoved) {
      gone_.insert(entry.guest);
    }
  }
  // The open ones whose rules wait for others come last.
  std::stable_partition(entries.begin(), entries.end(), [](const HandoverEntry& entry) {
    return entry.phase == HandoverPhase::kGivenUp || entry.phase == HandoverPhase::kMoved;
  });
  std::vector<OpenMatter> open;
  for (const HandoverEntry& entry : entries) {
    if (in_use(entry.guest)) continue;
    const std::string path = HandoverRecord::Path(options_.folder, entry);
    if (IsSettled(entry.phase)) {
      RemoveOld(path);
      continue;
    }
    OpenMatter matter = {.entry = entry, .path = path, .known = "", .advice = ""};
    const absl::Status status = Settle(entry, &matter);
    if (status.ok()) {
      options_.log(
          false, absl::StrCat(entry.guest, ": an earlier presyncd left it ", PhaseName(entry.phase),
                              " (peer ", entry.peer, "); settled"));
      continue;
    }
    if (matter.advice.empty()) matter.advice = "tried again";
    matter.known = std::string(status.message());
    open.push_back(std::move(matter));
  }
  for (const std::string& path : unreadable) {
    open.push_back({.entry = {},
                    .path = path,
                    .known = absl::StrCat("the handover record ", path, " can't be read"),
                    .advice = absl::StrCat("look at both hosts where the guest runs, then remove ",
                                           "the file: rm ", path),
                    .for_a_person = true});
  }
  Publish(std::move(open));
}

void Recovery::Publish(std::vector<OpenMatter> open) {
  std::set<std::string> known_before;
  {
    MutexLock lock(&mutex_);
    for (const OpenMatter& matter : open_) known_before.insert(MatterText(matter));
  }
  for (const OpenMatter& matter : open) {
    const std::string text = MatterText(matter);
    if (!known_before.contains(text)) options_.log(true, text);
  }
  MutexLock lock(&mutex_);
  open_ = std::move(open);
}

void Recovery::RemoveOld(const std::string& path) {
  struct stat st;
  if (::stat(path.c_str(), &st) != 0) return;
  if (absl::Now() - absl::TimeFromTimespec(st.st_mtim) < options_.keep_settled) return;
  if (::unlink(path.c_str()) == 0) {
    options_.log(false, absl::StrCat("removed ", path, ": settled for a long time"));
  }
}

absl::Status Recovery::Decide(const std::string& guest, Decision decision, const InUse& in_use) {
  std::vector<OpenMatter> matters;
  for (OpenMatter& matter : open()) {
    if (matter.entry.guest == guest) matters.push_back(std::move(matter));
  }
  if (matters.empty()) {
    return absl::NotFoundError(absl::StrCat("nothing is open about ", guest, " on this host"));
  }
  if (in_use(guest)) {
    return absl::FailedPreconditionError(
        absl::StrCat(guest, " is being synced here now; stop that first"));
  }
  {
    MutexLock pass(&pass_mutex_);
    for (const OpenMatter& matter : matters) {
      const HandoverEntry& entry = matter.entry;
      const bool given_up = entry.phase == HandoverPhase::kGivenUp;
      if (decision == Decision::kForget) {
        if (given_up) {
          return absl::FailedPreconditionError(
              absl::StrCat("where ", guest, " runs has to be said: ", LookAndSettle(entry)));
        }
        const absl::Status done = entry.role == HandoverRole::kSource
                                      ? HandoverRecord::Forget(options_.folder, entry)
                                      : Append(entry, HandoverPhase::kRunning);
        if (!done.ok()) return done;
        continue;
      }
      if (!given_up) {
        return absl::FailedPreconditionError(
            absl::StrCat("that does not fit: ", MatterText(matter)));
      }
      const absl::Status done =
          Append(entry, decision == Decision::kRunsHere ? HandoverPhase::kTakenBack
                                                        : HandoverPhase::kMoved);
      if (!done.ok()) return done;
    }
  }
  options_.log(true, absl::StrCat(guest, ": settled by hand"));
  Pass(in_use);
  return absl::OkStatus();
}

}  // namespace presync
