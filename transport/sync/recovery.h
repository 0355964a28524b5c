// What becomes of handovers that a presyncd left open when it ended: finished or rolled back by the
// rules of docs/protocol.md, "After a crash", again and again until they are settled; and what only
// a person can decide, in words.
#pragma once

#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/functional/function_ref.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "transport/mutex.h"
#include "transport/sync/guest_claims.h"
#include "transport/sync/handover_record.h"
#include "transport/sync/settlement.h"
#include "transport/wire/control.pb.h"

namespace presync {

// What recovery may do with the guests of this host, and whom it can ask. Calls block for some
// seconds at most. Any thread; of one guest one thread at a time. "Gone": the very process of the
// entry was seen to have ended.
class RecoveryHost {
 public:
  virtual ~RecoveryHost() = default;

  // The guest is this host's: it goes on if a handover of presync's had stopped it. Ok too if it is
  // gone: there is nothing to go on with. Never touches what somebody else did with it.
  virtual absl::Status ResumeSource(const HandoverEntry& entry) = 0;

  // The guest has moved away: its old process here ends. Ok too if it is gone. FAILED_PRECONDITION:
  // the entry does not say which process it is, and what answers there may be somebody else's.
  virtual absl::Status QuitSource(const HandoverEntry& entry) = 0;

  // The guest was given up: it must stand still here. Ok: it does, or is gone, or the entry does
  // not say which process it is. ABORTED: it ran; it was stopped again.
  virtual absl::Status HoldSource(const HandoverEntry& entry) = 0;

  // What the target says became of the guest. `end_it`: a person says that it goes on here, so a
  // target that was told to run it, and does not, is to end it. Errors: it can't be asked.
  virtual absl::StatusOr<wire::Outcome> AskTarget(const HandoverEntry& entry, bool end_it) = 0;

  // Makes sure that a guest that waited here never runs. Ok: it is certain. ALREADY_EXISTS: that
  // very guest runs. FAILED_PRECONDITION: what answers there runs, or may be another one.
  virtual absl::Status EndOrphan(const HandoverEntry& entry) = 0;

  // Runs a guest that had been told to run. Ok: it runs. NOT_FOUND: it is gone.
  virtual absl::Status RunOrphan(const HandoverEntry& entry) = 0;

  // Whether a guest that came here may still be there: false only if it is gone.
  virtual bool OrphanLives(const HandoverEntry& entry) = 0;
};

// A record that is not settled.
struct OpenMatter {
  HandoverEntry entry;
  std::string path;           // of the record
  std::string known;          // what is known, and why it is not settled
  std::string advice;         // what to look at and to type, or what presyncd waits for
  bool for_a_person = false;  // presyncd can't settle it by itself, whatever comes back
  // The guest is this host's, and its process would not run it when it was asked to.
  bool resume_refused = false;
};

// "web1: given up to 10.0.0.2:7350 ...; look ...".
std::string MatterText(const OpenMatter& matter);

// Thread-safe; one pass at a time.
class Recovery {
 public:
  struct Options {
    std::string folder;
    // Settled records of a target are what a source in doubt is answered from; a source that was
    // away for longer needs a person. No step of the wall clock counts.
    absl::Duration keep_settled = absl::Hours(7 * 24);
    std::function<BootMoment()> now = NowInBoot;
    // Shared with the sessions of this presyncd.
    std::shared_ptr<GuestClaims> claims = std::make_shared<GuestClaims>();
    std::function<void(bool problem, const std::string& line)> log = [](bool, const std::string&) {
    };
  };
  // Whether a guest is in a session's hands now; its records are then left alone.
  using InUse = std::function<bool(const std::string& guest)>;

  // `host` must outlive it.
  Recovery(Options options, RecoveryHost* host);

  // Goes through all records, several guests at a time; what is settled is removed (source) or says
  // so (target). Logs what changed. First asks targets, each peer in a thread of its own, for some
  // seconds at most.
  void Pass(const InUse& in_use) ABSL_LOCKS_EXCLUDED(pass_mutex_, mutex_);

  // The same without asking anybody: for a presyncd that does not listen yet.
  void PassHere(const InUse& in_use) ABSL_LOCKS_EXCLUDED(pass_mutex_, mutex_);

  // Makes every guest that was given up stand still here, whoever resumed it. Call it each second.
  void HoldGivenUp(const InUse& in_use) ABSL_LOCKS_EXCLUDED(mutex_);

  std::vector<OpenMatter> open() const ABSL_LOCKS_EXCLUDED(mutex_);

  // Settles what is open about `guest` as a person said: asks its target first, and looks again
  // before anything is changed. The sentence that says what was done. Waits for no pass. NOT_FOUND:
  // nothing is open; FAILED_PRECONDITION: the word does not fit, or the target knows better, with
  // what does fit; ABORTED: it was settled meanwhile; else the host's errors.
  absl::StatusOr<std::string> Decide(const std::string& guest, const Word& word,
                                     const InUse& in_use) ABSL_LOCKS_EXCLUDED(mutex_);

 private:
  using Entries = std::vector<HandoverEntry>;

  // recovery_rules.cc: of one record, whose guest is claimed; it was read since.
  // Settles it without asking anybody: ok, or what is open about it.
  absl::Status Settle(const HandoverEntry& entry, const Entries& all, OpenMatter* matter);
  absl::Status SettleGivenUp(const HandoverEntry& entry, const Entries& all, OpenMatter* matter);
  absl::Status SettleWaiting(const HandoverEntry& entry, OpenMatter* matter);
  absl::Status SettleToldToRun(const HandoverEntry& entry, const Entries& all, OpenMatter* matter);
  absl::Status SettleRanUntold(const HandoverEntry& entry, OpenMatter* matter);
  absl::Status TakeAnswer(const HandoverEntry& entry, const absl::StatusOr<wire::Outcome>& outcome,
                          const Entries& all, OpenMatter* matter);
  absl::Status Moved(const HandoverEntry& entry, OpenMatter* matter);
  absl::Status Resume(const HandoverEntry& entry, const Entries& all, OpenMatter* matter);
  bool WasRefused(const std::string& path) const ABSL_LOCKS_EXCLUDED(mutex_);
  absl::Status RunsThereUntold(const HandoverEntry& entry, const wire::Outcome& outcome,
                               OpenMatter* matter);
  absl::Status Append(const HandoverEntry& entry, std::initializer_list<HandoverPhase> phases);
  absl::Status Apply(const HandoverEntry& entry, const Word& word, std::string* done);
  absl::Status ApplyAtTarget(const HandoverEntry& entry, const Word& word, std::string* done);

  // recovery.cc: who is looked at, when.
  void AskAll(const Entries& given_up, const InUse& in_use);
  void LookAt(const std::string& guest, const InUse& in_use);
  // Reads it again under the guest's claim, and does `what` with it unless a session has the guest,
  // or it is not what it was. The matter is published.
  void Act(const HandoverEntry& entry, const InUse& in_use,
           absl::FunctionRef<absl::Status(const HandoverEntry& now, const Entries& all,
                                          OpenMatter* matter)>
               what) ABSL_LOCKS_EXCLUDED(mutex_);
  absl::Status DecideOne(const HandoverEntry& entry, const Word& word, const InUse& in_use,
                         std::string* done);
  void RemoveOld(const HandoverEntry& entry);
  void Publish(OpenMatter matter) ABSL_LOCKS_EXCLUDED(mutex_);
  void Close(const std::string& path) ABSL_LOCKS_EXCLUDED(mutex_);

  const Options options_;
  RecoveryHost* const host_;

  Mutex pass_mutex_;
  mutable Mutex mutex_ ABSL_ACQUIRED_AFTER(pass_mutex_);
  std::map<std::string, OpenMatter> open_ ABSL_GUARDED_BY(mutex_);  // by the record's path
};

}  // namespace presync
