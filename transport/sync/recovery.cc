#include "transport/sync/recovery.h"

#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <set>
#include <thread>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"

namespace presync {
namespace {

// At a time: guests whose QEMUs, or peers whose presyncds, may all be mute.
constexpr size_t kMostThreads = 16;
// What somebody else has in hand is looked at again soon.
constexpr absl::Duration kClaimTimeout = absl::Seconds(1);
// A person waits, and whoever has the guest in hand needs some seconds at most.
constexpr absl::Duration kDecideTimeout = absl::Seconds(30);

void InParallel(size_t count, absl::FunctionRef<void(size_t)> work) {
  std::atomic<size_t> next = 0;
  const auto run = [&] {
    for (size_t i = next++; i < count; i = next++) work(i);
  };
  std::vector<std::thread> threads;
  for (size_t i = 1; i < std::min(count, kMostThreads); ++i) threads.emplace_back(run);
  run();
  for (std::thread& thread : threads) thread.join();
}

std::vector<HandoverEntry> ReadRecords(const std::string& folder) {
  std::vector<std::string> unreadable;
  return HandoverRecord::ReadAll(folder, &unreadable);
}

// Whether a word can be about such a record at all.
bool Fits(const HandoverEntry& entry, Decision decision) {
  const bool at_source = entry.role == HandoverRole::kSource;
  const bool given_up = entry.phase == HandoverPhase::kGivenUp;
  switch (decision) {
    case Decision::kRunsHere:
    case Decision::kRunsThere:
      return at_source && given_up;
    case Decision::kForget:
      return at_source && !given_up;
    case Decision::kRan:
    case Decision::kNeverRan:
      return !at_source;
  }
  return false;
}

}  // namespace

std::string MatterText(const OpenMatter& matter) {
  const HandoverEntry& entry = matter.entry;
  if (entry.guest.empty()) return absl::StrCat(matter.known, "; ", matter.advice);
  if (absl::EndsWith(matter.path, ".left")) {  // of a guest that left: departures.h
    return absl::StrCat(entry.guest, ": ", matter.known, "; ", matter.advice);
  }
  return absl::StrCat(entry.guest, ": an earlier presyncd left it ", PhaseName(entry.phase), " (",
                      entry.role == HandoverRole::kSource ? "source" : "target", ", peer ",
                      entry.peer, "): ", matter.known, "; ", matter.advice);
}

Recovery::Recovery(Options options, RecoveryHost* host)
    : options_(std::move(options)), host_(host) {}

std::vector<OpenMatter> Recovery::open() const {
  std::vector<OpenMatter> all;
  MutexLock lock(&mutex_);
  for (const auto& [path, matter] : open_) all.push_back(matter);
  return all;
}

void Recovery::Pass(const InUse& in_use) {
  {
    MutexLock pass(&pass_mutex_);
    Entries given_up = ReadRecords(options_.folder);
    std::erase_if(given_up, [&](const HandoverEntry& entry) {
      return entry.phase != HandoverPhase::kGivenUp || in_use(entry.guest);
    });
    AskAll(given_up, in_use);
  }
  PassHere(in_use);
}

// A peer that does not answer for one guest is not asked for the others.
void Recovery::AskAll(const Entries& given_up, const InUse& in_use) {
  std::map<std::string, Entries> by_peer;
  for (const HandoverEntry& entry : given_up) by_peer[entry.peer].push_back(entry);
  std::vector<Entries> peers;
  for (auto& [peer, entries] : by_peer) peers.push_back(std::move(entries));
  InParallel(peers.size(), [&](size_t i) {
    absl::StatusOr<wire::Outcome> outcome = wire::Outcome();
    for (const HandoverEntry& entry : peers[i]) {
      const bool mute =
          absl::IsUnavailable(outcome.status()) || absl::IsDeadlineExceeded(outcome.status());
      if (!mute) outcome = host_->AskTarget(entry, /*end_it=*/false);
      Act(entry, in_use, [&](const HandoverEntry& now, const Entries& all, OpenMatter* matter) {
        return TakeAnswer(now, outcome, all, matter);
      });
    }
  });
}

void Recovery::PassHere(const InUse& in_use) {
  MutexLock pass(&pass_mutex_);
  std::vector<std::string> unreadable;
  std::set<std::string> names, paths;
  for (const HandoverEntry& entry : HandoverRecord::ReadAll(options_.folder, &unreadable)) {
    names.insert(entry.guest);
    paths.insert(HandoverRecord::Path(options_.folder, entry));
  }
  const std::vector<std::string> guests(names.begin(), names.end());
  InParallel(guests.size(), [&](size_t i) { LookAt(guests[i], in_use); });
  for (const std::string& path : unreadable) {
    paths.insert(path);
    Publish({.entry = {},
             .path = path,
             .known = absl::StrCat("the handover record ", path, " can't be read"),
             .advice = absl::StrCat("look at both hosts where the guest runs, then remove ",
                                    "the file: rm ", path),
             .for_a_person = true});
  }
  MutexLock lock(&mutex_);
  std::erase_if(open_, [&](const auto& each) { return !paths.contains(each.first); });
}

// Those come first for which others wait.
void Recovery::LookAt(const std::string& guest, const InUse& in_use) {
  Entries entries = ReadRecords(options_.folder);
  std::erase_if(entries, [&](const HandoverEntry& entry) { return entry.guest != guest; });
  std::stable_partition(entries.begin(), entries.end(), [](const HandoverEntry& entry) {
    return entry.phase == HandoverPhase::kGivenUp || entry.phase == HandoverPhase::kMoved;
  });
  for (const HandoverEntry& entry : entries) {
    const bool gone = entry.phase == HandoverPhase::kRanUntold && !host_->OrphanLives(entry);
    if (IsSettled(entry.phase) || gone) {
      Close(HandoverRecord::Path(options_.folder, entry));
      if (!in_use(guest)) RemoveOld(entry);
      continue;
    }
    Act(entry, in_use, [&](const HandoverEntry& now, const Entries& all, OpenMatter* matter) {
      return Settle(now, all, matter);
    });
  }
}

void Recovery::Act(const HandoverEntry& entry, const InUse& in_use,
                   absl::FunctionRef<absl::Status(const HandoverEntry& now, const Entries& all,
                                                  OpenMatter* matter)>
                       what) {
  const std::string path = HandoverRecord::Path(options_.folder, entry);
  const GuestClaims::Claim claim = options_.claims->Take(entry.guest, kClaimTimeout);
  if (!claim.held()) return;
  if (in_use(entry.guest)) return Close(path);
  const Entries all = ReadRecords(options_.folder);
  const auto now = std::find_if(all.begin(), all.end(), [&](const HandoverEntry& each) {
    return HandoverRecord::Path(options_.folder, each) == path;
  });
  if (now == all.end()) return Close(path);
  if (now->phase != entry.phase) return;  // a later look is about that
  OpenMatter matter = {.entry = *now, .path = path, .known = "", .advice = ""};
  const absl::Status status = what(*now, all, &matter);
  if (status.ok()) {
    Close(path);
    options_.log(false, absl::StrCat(entry.guest, ": an earlier presyncd left it ",
                                     PhaseName(entry.phase), " (peer ", entry.peer, "); settled"));
    return;
  }
  if (matter.advice.empty()) matter.advice = "tried again";
  matter.known = std::string(status.message());
  Publish(std::move(matter));
}

void Recovery::HoldGivenUp(const InUse& in_use) {
  std::vector<OpenMatter> given_up = open();
  std::erase_if(given_up, [](const OpenMatter& matter) {
    return matter.entry.guest.empty() || matter.entry.phase != HandoverPhase::kGivenUp;
  });
  InParallel(given_up.size(), [&](size_t i) {
    OpenMatter& matter = given_up[i];
    const GuestClaims::Claim claim =
        options_.claims->Take(matter.entry.guest, absl::ZeroDuration());
    if (!claim.held() || in_use(matter.entry.guest)) return;
    const auto now = HandoverRecord::Read(options_.folder, matter.entry);
    if (!now.ok() || now->phase != HandoverPhase::kGivenUp) return;
    const absl::Status still = host_->HoldSource(*now);
    if (!absl::IsAborted(still)) return;
    matter.known = std::string(still.message());
    Publish(std::move(matter));
  });
}

absl::StatusOr<std::string> Recovery::Decide(const std::string& guest, const Word& word,
                                             const InUse& in_use) {
  Entries entries = ReadRecords(options_.folder);
  std::erase_if(entries, [&](const HandoverEntry& entry) {
    return entry.guest != guest || IsSettled(entry.phase);
  });
  if (entries.empty()) {
    return absl::NotFoundError(absl::StrCat("nothing is open about ", guest, " on this host"));
  }
  if (in_use(guest)) {
    return absl::FailedPreconditionError(
        absl::StrCat(guest, " is being synced here now; stop that first"));
  }
  std::string done;
  for (const HandoverEntry& entry : entries) {
    if (!Fits(entry, word.decision)) continue;
    if (absl::Status s = DecideOne(entry, word, in_use, &done); !s.ok()) return s;
  }
  if (done.empty()) {
    LookAt(guest, in_use);
    std::string text = absl::StrCat("that does not fit what is open about ", guest, " here");
    for (const OpenMatter& matter : open()) {
      if (matter.entry.guest == guest) absl::StrAppend(&text, ". ", MatterText(matter));
    }
    return absl::FailedPreconditionError(text);
  }
  options_.log(true, absl::StrCat(guest, ": settled by hand: ", done));
  LookAt(guest, in_use);
  return done;
}

absl::Status Recovery::DecideOne(const HandoverEntry& entry, const Word& word, const InUse& in_use,
                                 std::string* done) {
  if (entry.phase == HandoverPhase::kGivenUp) {
    const bool here = word.decision == Decision::kRunsHere;
    const absl::StatusOr<wire::Outcome> outcome = host_->AskTarget(entry, /*end_it=*/here);
    if (absl::Status s = CheckWord(entry.guest, entry.peer, word, outcome); !s.ok()) return s;
  }
  const GuestClaims::Claim claim = options_.claims->Take(entry.guest, kDecideTimeout);
  if (!claim.held() || in_use(entry.guest)) {
    return absl::AbortedError(absl::StrCat(entry.guest, " is in other hands just now; try again"));
  }
  const absl::StatusOr<HandoverEntry> now = HandoverRecord::Read(options_.folder, entry);
  if (!now.ok() || now->phase != entry.phase) {
    return absl::AbortedError(absl::StrCat(
        entry.guest, " was settled meanwhile: ", now.ok() ? PhaseName(now->phase) : "it is done",
        "; nothing was changed. Look at presync status"));
  }
  return Apply(*now, word, done);
}

void Recovery::Publish(OpenMatter matter) {
  const std::string text = MatterText(matter);
  bool news = false;
  {
    MutexLock lock(&mutex_);
    const auto before = open_.find(matter.path);
    news = before == open_.end() || MatterText(before->second) != text;
    open_[matter.path] = std::move(matter);
  }
  if (news) options_.log(true, text);
}

void Recovery::Close(const std::string& path) {
  MutexLock lock(&mutex_);
  open_.erase(path);
}

// Its age is counted in time that this host was up, as far as that is known: a step of the wall
// clock must not take an answer away that somebody may still need.
void Recovery::RemoveOld(const HandoverEntry& entry) {
  const std::string path = HandoverRecord::Path(options_.folder, entry);
  const BootMoment now = options_.now();
  const bool this_boot = entry.at.boot == now.boot;
  const absl::Duration age = absl::Seconds(now.uptime_s - (this_boot ? entry.at.uptime_s : 0));
  struct stat st;
  if (::stat(path.c_str(), &st) != 0 || age < options_.keep_settled) return;
  if (entry.at.boot.empty()) {  // of an older presyncd
    if (absl::Now() - absl::TimeFromTimespec(st.st_mtim) < options_.keep_settled) return;
  }
  if (::unlink(path.c_str()) == 0) {
    options_.log(false, absl::StrCat("removed ", path, ": settled for a long time"));
  }
}

}  // namespace presync
