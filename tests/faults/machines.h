// The guests of the fault campaign: model QEMUs on both hosts, which outlive the presyncds that use
// them, and what an onlooker knows of them.
#pragma once

#include <atomic>
#include <functional>
#include <memory>
#include <optional>
#include <random>
#include <string>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "tests/faults/side.h"
#include "tests/transport/sync/model_guest.h"
#include "transport/mutex.h"
#include "transport/sync/recovery.h"
#include "transport/sync/target_host.h"

namespace presync {

// Called before and after each call that reaches a guest: "source stop", "target run", ...
using StepHook = std::function<void(const std::string& step, bool before)>;

// What a monitor does instead of its work, from a command on.
enum class MonitorFault { kNone, kError, kClosed, kSlow };

// The QEMU at one host. Its states are those that QEMU's run states come down to.
enum class VmState {
  kWaiting,  // for its device state
  kLoaded,   // paused, could run
  kRunning,
  kStopped,  // by a handover, at the source
  kPaused,   // by its operator, at the target
  kLeft,     // moved away from the source by QEMU's own migration
  kGone,
};

// Everything that exists once in a run: the guest's truth, and both hosts' QEMUs. Thread-safe.
class Machines {
 public:
  explicit Machines(uint64_t seed);

  // The guest writes some pages where it runs, and notes what they hold.
  void GuestWrites(bool at_source, int pages);

  // From now on the guest at the source reads a disk all the time, past the page cache: each read
  // is seen when it is submitted, and fills its page some milliseconds later, unseen.
  void ReadSlowly() { reads_slowly_ = true; }
  // One such read takes `takes`.
  void HangARead(absl::Duration takes) ABSL_LOCKS_EXCLUDED(mutex_);
  // What QEMU does when it stops: every read has ended.
  void DrainReads() ABSL_LOCKS_EXCLUDED(mutex_);
  // How long the longest read took that has ended since this was last asked.
  absl::Duration TakeLongestRead() ABSL_LOCKS_EXCLUDED(mutex_);

  struct TargetVm;

  // From outside. -----------------------------------------------------------------------------
  int running() const ABSL_LOCKS_EXCLUDED(mutex_);
  bool ever_two() const { return ever_two_; }
  bool source_runs() const ABSL_LOCKS_EXCLUDED(mutex_);
  bool target_runs() const ABSL_LOCKS_EXCLUDED(mutex_);
  // The guest was running, or was this host's to run, in a QEMU that was killed.
  bool guest_killed() const { return guest_killed_; }
  // Pages that are not what the guest wrote last, where it runs.
  std::vector<PageIndex> WrongPages() ABSL_LOCKS_EXCLUDED(mutex_);
  void KillSource() ABSL_LOCKS_EXCLUDED(mutex_);
  void KillTarget() ABSL_LOCKS_EXCLUDED(mutex_);
  // As by SIGTERM, with discard-data=on: QEMU empties its memory before it has ended.
  void EndTarget() ABSL_LOCKS_EXCLUDED(mutex_);
  // Its record may say told-to-run: a loaded guest that is killed from now on was the guest's.
  void NoteTargetCrashed() ABSL_LOCKS_EXCLUDED(mutex_);
  std::string Describe() const ABSL_LOCKS_EXCLUDED(mutex_);

  // What people and services do, with QEMU's own commands; false: it is in no state for that. ---
  // `cont` at a source whose state is saved, and at the QEMU that waits with its state loaded: a
  // guest that then runs does so by hand, until presync lets it, or ends it.
  bool ContSource() ABSL_LOCKS_EXCLUDED(mutex_);
  bool ContTarget() ABSL_LOCKS_EXCLUDED(mutex_);
  bool PauseTarget() ABSL_LOCKS_EXCLUDED(mutex_);
  void ContPaused() ABSL_LOCKS_EXCLUDED(mutex_);
  // QEMU's own migration, to a third host.
  bool MigrateAway() ABSL_LOCKS_EXCLUDED(mutex_);
  // A service that starts the guest's QEMU when it has ended.
  bool StartSourceAgain() ABSL_LOCKS_EXCLUDED(mutex_);
  // A person ends the guest that somebody ran at the target although it runs at the source.
  void EndStrayTarget() ABSL_LOCKS_EXCLUDED(mutex_);
  // From now on two may run, or none, because a person insisted.
  void NoteForced() { forced_ = true; }
  void LetTargetRun(TargetVm* vm) ABSL_LOCKS_EXCLUDED(mutex_);
  bool forced() const { return forced_; }
  bool two_by_force() const { return two_by_force_; }
  bool by_hand() const { return by_hand_source_ || by_hand_target_; }
  bool restarted() const { return restarted_; }
  bool elsewhere() const { return elsewhere_; }
  bool target_lives() const ABSL_LOCKS_EXCLUDED(mutex_);

  // As presyncd sees them. --------------------------------------------------------------------
  ModelMemory& source_memory() { return source_memory_; }
  VmState source_state() const ABSL_LOCKS_EXCLUDED(mutex_);
  // Moves the source's QEMU from any of `from` to `to`; false: it is in another state.
  bool MoveSource(std::initializer_list<VmState> from, VmState to) ABSL_LOCKS_EXCLUDED(mutex_);

  // One QEMU of the target, with its memory. There is one at a time; a new one replaces one that is
  // gone.
  struct TargetVm {
    explicit TargetVm(const std::vector<PageCount>& regions) : memory(regions) {}
    ModelMemory memory;
    VmState state = VmState::kGone;  // guarded by the machines' mutex
    bool told = false;               // it was run, or had the order to
    bool untold = false;             // somebody ran it before that
    std::optional<CopyOwner> note;   // durable; guarded by the machines' mutex
  };
  void SetNote(TargetVm* vm, std::optional<CopyOwner> note) ABSL_LOCKS_EXCLUDED(mutex_);
  std::optional<CopyOwner> NoteOf(const TargetVm& vm) const ABSL_LOCKS_EXCLUDED(mutex_);
  // Memory for a guest that comes. ALREADY_EXISTS: it runs here.
  absl::StatusOr<std::shared_ptr<TargetVm>> NewTarget() ABSL_LOCKS_EXCLUDED(mutex_);
  std::shared_ptr<TargetVm> target() const ABSL_LOCKS_EXCLUDED(mutex_);
  VmState state_of(const TargetVm& vm) const ABSL_LOCKS_EXCLUDED(mutex_);
  bool MoveTarget(TargetVm* vm, std::initializer_list<VmState> from, VmState to)
      ABSL_LOCKS_EXCLUDED(mutex_);
  // The order to run comes: a QEMU that is killed from now on was the guest. False: it was refused.
  void NoteToldToRun(TargetVm* vm, bool told) ABSL_LOCKS_EXCLUDED(mutex_);
  bool RanUntold(const TargetVm& vm) const ABSL_LOCKS_EXCLUDED(mutex_);
  void NoteSaving(bool saving, bool saved) ABSL_LOCKS_EXCLUDED(mutex_);

 private:
  struct Read {
    PageIndex page = 0;
    absl::Time since, until;
  };
  void BeginRead(absl::Duration takes) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void EndReads(absl::Time until) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void Look() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);

  mutable Mutex mutex_;
  std::mt19937_64 random_ ABSL_GUARDED_BY(mutex_);
  ModelMemory source_memory_;
  std::unique_ptr<ScratchMemory> truth_;
  VmState source_ ABSL_GUARDED_BY(mutex_) = VmState::kRunning;
  std::shared_ptr<TargetVm> target_ ABSL_GUARDED_BY(mutex_);
  std::vector<std::shared_ptr<TargetVm>> all_targets_ ABSL_GUARDED_BY(mutex_);
  std::atomic<bool> reads_slowly_ = false;
  std::vector<Read> reads_ ABSL_GUARDED_BY(mutex_);  // under way
  absl::Duration longest_read_ ABSL_GUARDED_BY(mutex_) = absl::ZeroDuration();
  std::atomic<bool> ever_two_ = false;
  std::atomic<bool> guest_killed_ = false;
  bool saving_ ABSL_GUARDED_BY(mutex_) = false;  // presync's settings are on at the source
  bool saved_ ABSL_GUARDED_BY(mutex_) = false;   // and its state is saved: QEMU takes `cont`
  std::atomic<bool> by_hand_source_ = false;
  std::atomic<bool> by_hand_target_ = false;
  std::atomic<bool> forced_ = false;
  std::atomic<bool> two_by_force_ = false;
  std::atomic<bool> restarted_ = false;
  std::atomic<bool> elsewhere_ = false;
};

inline const std::vector<PageCount> kFaultRegions = {160, 96};
inline constexpr PageCount kFaultPages = 256;

// A monitor of one QEMU that can be broken. Thread-safe.
class Monitor {
 public:
  explicit Monitor(StepHook hook) : hook_(std::move(hook)) {}
  void Break(MonitorFault fault) { fault_ = fault; }
  // A call of `life` under the name of `step`, unless a fault answers in its place.
  absl::Status Call(Life* life, const std::string& step,
                    const std::function<absl::Status()>& effect);

 private:
  const StepHook hook_;
  std::atomic<MonitorFault> fault_ = MonitorFault::kNone;
};

// What a presyncd at the source holds of the guest. All must outlive it.
std::unique_ptr<SourceGuest> MakeSourceGuest(Machines* machines, Monitor* monitor, Life* life);
std::unique_ptr<DirtyLog> MakeSourceLog(Machines* machines, Life* life);

// What a presyncd at the target is made of. `refuses`: places fail for lack of room while it says
// so. All must outlive it.
std::unique_ptr<TargetHost> MakeTargetHost(Machines* machines, Monitor* monitor, Life* life,
                                           const std::atomic<bool>* no_room);

// How the source asks the target: RecoveryHost::AskTarget.
using AskPeer =
    std::function<absl::StatusOr<wire::Outcome>(const HandoverEntry& entry, bool end_it)>;

// Recovery at either host; `ask` is null at a target.
std::unique_ptr<RecoveryHost> MakeRecoveryHost(Machines* machines, Monitor* monitor, Life* life,
                                               AskPeer ask);

}  // namespace presync
