// One run of the fault campaign over the fake link: a plan drawn from a seed, and what came of it.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "absl/time/time.h"

namespace presync {

enum class Fault {
  kNone,
  kCrashSource,  // its presyncd: everything but the durable records is gone
  kCrashTarget,
  kCrashBoth,
  kStopSource,  // as SIGSTOP, for a while
  kStopTarget,
  kKillSourceQemu,
  kKillTargetQemu,
  kEndTargetQemu,  // in order: then it empties its memory, which is the copy
  kLinkDown,       // for a while
  kLinkFlaps,
  kLinkReset,
  kLinkSilent,  // nothing passes for a while, and nobody is told
  kLinkFails,   // the page link alone, in the middle of its work
  kControlTruncated,
  kControlDuplicated,
  kControlCorrupted,
  kControlDelayed,
  kNoRoom,     // at the target
  kSlowReads,  // the guest reads a disk past the page cache, all the time from then on
  kReadHangs,  // one such read takes as long as the strike lasts
  kSourceMonitorErrs,
  kSourceMonitorCloses,
  kSourceMonitorStalls,
  kTargetMonitorErrs,
  kTargetMonitorCloses,
  kTargetMonitorStalls,
  // What people and services do beside presync: only with actors.
  kContSource,
  kContTarget,
  kPauseTarget,
  kQuitTarget,
  kMigrateAway,
  kService,  // starts the source's QEMU again whenever it has ended, if presync may-start lets it
  kSettleRight,
  kSettleWrong,  // with --force
};
const std::vector<Fault>& AllFaults();
const std::vector<Fault>& AllActors();
const char* FaultName(Fault fault);

// When: around a step (a control message's name, or "source stop", "target run", ...), or at a
// moment.
struct Strike {
  Fault fault = Fault::kNone;
  std::string step;                          // empty: at a moment
  bool before = true;                        // of the step
  bool in_sync = false;                      // at a moment of the sync, not of the launch
  absl::Duration at = absl::ZeroDuration();  // after the sync's, or the launch's, begin
  absl::Duration lasts = absl::ZeroDuration();
};

struct Plan {
  uint64_t seed = 0;
  std::vector<Strike> strikes;  // the first is the run's fault; now and then there is a second
  bool verify = false;
};

// Everything in a plan follows from its seed; runs take the faults in turn, and with `actors`
// those, too: one of them is then the run's, and now and then there is another.
Plan DrawPlan(uint64_t campaign_seed, uint64_t run, bool actors);
std::string PlanText(const Plan& plan);
// "before run", "in the sync", ...: without the moment's time.
std::string Where(const Strike& strike);

struct Outcome {
  std::string what;  // "moved", "stayed" or "guest killed"
  bool lost = false;
  bool doubled = false;
  uint64_t pages_differing = 0;
  bool restart_failed = false;
  bool doubled_by_force = false;   // two ran because a person insisted: no violation
  bool lost_by_force = false;      // likewise none
  bool doubled_unnoticed = false;  // two run, and no status says so
  bool struck = false;             // the first fault came to pass
  std::string text;                // what is wrong
  bool ok() const {
    return !lost && !doubled && !doubled_unnoticed && pages_differing == 0 && !restart_failed;
  }
};

// Runs it to the end: faults, healing, restarts, recovery, and a launch without faults afterwards.
// With `log` both presyncds' log lines go to stderr.
Outcome RunPlan(const Plan& plan, bool log);

}  // namespace presync
