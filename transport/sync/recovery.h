// What becomes of handovers that a presyncd left open when it ended: finished or rolled back by the
// rules of docs/protocol.md, "After a crash", again and again until they are settled; and what only
// a person can decide, in words.
#pragma once

#include <functional>
#include <set>
#include <string>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "transport/mutex.h"
#include "transport/sync/handover_record.h"
#include "transport/wire/control.pb.h"

namespace presync {

// What recovery may do with the guests of this host, and whom it can ask. Calls block for some
// seconds at most. One thread at a time.
class RecoveryHost {
 public:
  virtual ~RecoveryHost() = default;

  // The guest is this host's: it goes on if a handover had stopped it. Ok too if its process is
  // gone: there is nothing to go on with. Never runs a guest that was paused for another reason.
  virtual absl::Status ResumeSource(const HandoverEntry& entry) = 0;

  // The guest has moved away: its old process here ends, if it stands where a handover leaves it.
  // Ok too if it is gone. FAILED_PRECONDITION: it stands elsewhere; it may be somebody else's.
  virtual absl::Status QuitSource(const HandoverEntry& entry) = 0;

  // What the target says became of the guest. Errors: it can't be asked.
  virtual absl::StatusOr<wire::Outcome> AskTarget(const HandoverEntry& entry) = 0;

  // Makes sure that a guest that waited under this address never runs. Ok: it is certain.
  // FAILED_PRECONDITION: it runs.
  virtual absl::Status EndOrphan(const std::string& address) = 0;

  // Runs a guest that had been told to run. Ok: it runs. NOT_FOUND: its process has ended.
  virtual absl::Status RunOrphan(const std::string& address) = 0;
};

// A record that is not settled.
struct OpenMatter {
  HandoverEntry entry;
  std::string path;           // of the record
  std::string known;          // what is known, and why it is not settled
  std::string advice;         // what to look at and to type, or what presyncd waits for
  bool for_a_person = false;  // presyncd can't settle it by itself, whatever comes back
};

// "web1: given up to 10.0.0.2:7350 ...; look ...".
std::string MatterText(const OpenMatter& matter);

// What a person found out (`presync settle`).
enum class Decision {
  kRunsHere,   // it certainly does not run on the other host: it goes on here
  kRunsThere,  // it runs on the other host: it must not run here
  kForget,     // the record says nothing true or useful any more
};

// Thread-safe; one pass or decision at a time, open() at any.
class Recovery {
 public:
  struct Options {
    std::string folder;
    // Settled records of a target are what a source in doubt is answered from; a source that was
    // away for longer needs a person.
    absl::Duration keep_settled = absl::Hours(7 * 24);
    std::function<void(bool problem, const std::string& line)> log = [](bool, const std::string&) {
    };
  };
  // Whether a guest is in a session's hands now; its records are then left alone.
  using InUse = std::function<bool(const std::string& guest)>;

  // `host` must outlive it.
  Recovery(Options options, RecoveryHost* host);

  // Goes through all records; what is settled is removed (source) or says so (target). Logs what
  // changed since the last pass. Blocks for some seconds at most for each open record.
  void Pass(const InUse& in_use) ABSL_LOCKS_EXCLUDED(pass_mutex_, mutex_);

  std::vector<OpenMatter> open() const ABSL_LOCKS_EXCLUDED(mutex_);

  // Settles what is open about `guest` as a person decided. NOT_FOUND: nothing is open;
  // FAILED_PRECONDITION: the decision does not fit, with the ones that do; else the host's errors:
  // nothing was changed.
  absl::Status Decide(const std::string& guest, Decision decision, const InUse& in_use)
      ABSL_LOCKS_EXCLUDED(pass_mutex_, mutex_);

 private:
  // Settles one record: ok, or what is open about it.
  absl::Status Settle(const HandoverEntry& entry, OpenMatter* matter)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(pass_mutex_);
  absl::Status SettleGivenUp(const HandoverEntry& entry, OpenMatter* matter)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(pass_mutex_);
  absl::Status SettleWaiting(const HandoverEntry& entry, OpenMatter* matter)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(pass_mutex_);
  absl::Status SettleToldToRun(const HandoverEntry& entry, OpenMatter* matter)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(pass_mutex_);
  absl::Status Moved(const HandoverEntry& entry, OpenMatter* matter)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(pass_mutex_);
  absl::Status Resume(const HandoverEntry& entry, OpenMatter* matter)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(pass_mutex_);
  absl::Status Append(const HandoverEntry& entry, HandoverPhase phase)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(pass_mutex_);
  void RemoveOld(const std::string& path) ABSL_EXCLUSIVE_LOCKS_REQUIRED(pass_mutex_);
  void Publish(std::vector<OpenMatter> open) ABSL_LOCKS_EXCLUDED(mutex_);

  const Options options_;
  RecoveryHost* const host_;

  Mutex pass_mutex_;
  std::set<std::string> gone_ ABSL_GUARDED_BY(pass_mutex_);  // guests that moved, or are given up

  mutable Mutex mutex_ ABSL_ACQUIRED_AFTER(pass_mutex_);
  std::vector<OpenMatter> open_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace presync
