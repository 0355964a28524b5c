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
  kGone,
};

// Everything that exists once in a run: the guest's truth, and both hosts' QEMUs. Thread-safe.
class Machines {
 public:
  explicit Machines(uint64_t seed);

  // The guest writes some pages where it runs, and notes what they hold.
  void GuestWrites(bool at_source, int pages);

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

 private:
  void Look() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);

  mutable Mutex mutex_;
  std::mt19937_64 random_ ABSL_GUARDED_BY(mutex_);
  ModelMemory source_memory_;
  std::unique_ptr<ScratchMemory> truth_;
  VmState source_ ABSL_GUARDED_BY(mutex_) = VmState::kRunning;
  std::shared_ptr<TargetVm> target_ ABSL_GUARDED_BY(mutex_);
  std::vector<std::shared_ptr<TargetVm>> all_targets_ ABSL_GUARDED_BY(mutex_);
  std::atomic<bool> ever_two_ = false;
  std::atomic<bool> guest_killed_ = false;
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

// Recovery at either host; `ask` is how the source asks the target.
std::unique_ptr<RecoveryHost> MakeRecoveryHost(
    Machines* machines, Monitor* monitor, Life* life,
    std::function<absl::StatusOr<wire::Outcome>(const HandoverEntry&)> ask);

}  // namespace presync
