#include "tests/faults/machines.h"

#include <fcntl.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <optional>
#include <utility>

#include "absl/strings/str_cat.h"
#include "predictor/check.h"
#include "transport/clock.h"

namespace presync {
namespace {

// What can be saved live, and what only once the guest stands still.
const char kLiveState[] = "live state;";
constexpr size_t kStoppedStateBytes = 20'000;

std::string WholeState() { return kLiveState + std::string(kStoppedStateBytes, 's'); }

std::unique_ptr<ScratchMemory> MakeScratch() {
  absl::StatusOr<std::unique_ptr<ScratchMemory>> scratch = ScratchMemory::Create(kFaultRegions);
  PRESYNC_CHECK(scratch.ok());
  return *std::move(scratch);
}

const char* Name(VmState state) {
  switch (state) {
    case VmState::kWaiting:
      return "waiting";
    case VmState::kLoaded:
      return "loaded";
    case VmState::kRunning:
      return "running";
    case VmState::kStopped:
      return "stopped";
    case VmState::kPaused:
      return "paused";
    case VmState::kLeft:
      return "moved elsewhere";
    case VmState::kGone:
      return "gone";
  }
  return "?";
}

void WriteAll(int fd, absl::string_view bytes) {
  while (!bytes.empty()) {
    const ssize_t n = ::send(fd, bytes.data(), bytes.size(), MSG_NOSIGNAL);
    if (n <= 0) return;
    bytes.remove_prefix(static_cast<size_t>(n));
  }
}

bool Contains(std::initializer_list<VmState> states, VmState state) {
  return std::find(states.begin(), states.end(), state) != states.end();
}

}  // namespace

// Machines. ---------------------------------------------------------------------------------------

Machines::Machines(uint64_t seed)
    : random_(seed), source_memory_(kFaultRegions), truth_(MakeScratch()) {
  GuestWrites(/*at_source=*/true, kFaultPages / 2);
}

void Machines::GuestWrites(bool at_source, int pages) {
  MutexLock lock(&mutex_);
  const bool runs = at_source ? source_ == VmState::kRunning
                              : target_ != nullptr && target_->state == VmState::kRunning;
  // Whoever resumed a guest that has been given up spoils that copy, and nobody else's.
  if (!runs || restarted_ || (at_source ? by_hand_source_ : by_hand_target_)) return;
  if (at_source) {
    EndReads(MonotonicNow());
    if (reads_slowly_) BeginRead(absl::Milliseconds(random_() % 30));
  }
  ModelMemory& memory = at_source ? source_memory_ : target_->memory;
  for (int i = 0; i < pages; ++i) {
    // Some pages are hot; one write in nine makes a page zero.
    const auto page = static_cast<PageIndex>(random_() % (random_() % 3 == 0 ? kFaultPages : 20));
    const uint64_t value = random_() % 9 == 0 ? 0 : random_() | 1;
    memory.Write(page, value);
    if (value == 0) {
      truth_->ZeroPage(page);
    } else {
      truth_->FillPage(page, value);
    }
  }
}

// The page is pinned, which is a write that the log sees.
void Machines::BeginRead(absl::Duration takes) {
  const auto page = static_cast<PageIndex>(random_() % kFaultPages);
  const uint64_t value = random_() | 1;
  source_memory_.Write(page, value);
  truth_->FillPage(page, value);
  const absl::Time now = MonotonicNow();
  reads_.push_back({page, now, now + takes});
}

void Machines::EndReads(absl::Time until) {
  std::erase_if(reads_, [&](const Read& read) {
    mutex_.AssertHeld();
    if (read.until > until) return false;
    const uint64_t value = random_() | 1;
    source_memory_.WriteUnseen(read.page, value);
    truth_->FillPage(read.page, value);
    longest_read_ = std::max(longest_read_, read.until - read.since);
    return true;
  });
}

void Machines::HangARead(absl::Duration takes) {
  MutexLock lock(&mutex_);
  if (source_ == VmState::kRunning && !restarted_ && !by_hand_source_) BeginRead(takes);
}

void Machines::DrainReads() {
  MutexLock lock(&mutex_);
  EndReads(absl::InfiniteFuture());
}

absl::Duration Machines::TakeLongestRead() {
  MutexLock lock(&mutex_);
  return std::exchange(longest_read_, absl::ZeroDuration());
}

void Machines::Look() {
  const bool target_runs = target_ != nullptr && target_->state == VmState::kRunning;
  const int running =
      (source_ == VmState::kRunning ? 1 : 0) + (target_runs ? 1 : 0) + (elsewhere_ ? 1 : 0);
  if (running < 2 || by_hand()) return;
  (forced_ ? two_by_force_ : ever_two_) = true;
}

int Machines::running() const {
  return (source_runs() ? 1 : 0) + (target_runs() ? 1 : 0) + (elsewhere_ ? 1 : 0);
}

bool Machines::source_runs() const { return source_state() == VmState::kRunning; }

bool Machines::target_runs() const {
  MutexLock lock(&mutex_);
  return target_ != nullptr && target_->state == VmState::kRunning;
}

std::vector<PageIndex> Machines::WrongPages() {
  MutexLock lock(&mutex_);
  if (restarted_ || forced_ || elsewhere_) return {};  // another guest's, or nobody's to look at
  if (target_ != nullptr && target_->state == VmState::kRunning && !by_hand_target_) {
    return truth_->Differences(target_->memory.scratch());
  }
  if (source_ == VmState::kRunning) return truth_->Differences(source_memory_.scratch());
  return {};
}

void Machines::KillSource() {
  MutexLock lock(&mutex_);
  const bool target_has_it =
      elsewhere_ || (target_ != nullptr && !by_hand_target_ &&
                     (target_->state == VmState::kRunning || target_->state == VmState::kPaused));
  if (source_ != VmState::kGone && !target_has_it) guest_killed_ = true;
  source_ = VmState::kGone;
  by_hand_source_ = false;
  source_memory_.Die();
}

void Machines::KillTarget() {
  MutexLock lock(&mutex_);
  if (target_ == nullptr || target_->state == VmState::kGone) return;
  if (target_->told) guest_killed_ = true;
  target_->state = VmState::kGone;
  by_hand_target_ = false;
}

void Machines::EndTarget() {
  {
    MutexLock lock(&mutex_);
    if (target_ == nullptr || target_->state == VmState::kGone) return;
    for (const Region& region : target_->memory.memory().regions()) {
      ::fallocate(region.fd(), FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0,
                  static_cast<off_t>(region.size_bytes()));
    }
  }
  KillTarget();
}

void Machines::NoteTargetCrashed() {
  MutexLock lock(&mutex_);
  if (target_ != nullptr && target_->state == VmState::kLoaded) target_->told = true;
}

std::string Machines::Describe() const {
  MutexLock lock(&mutex_);
  return absl::StrCat("the source's QEMU is ", Name(source_), ", the target's ",
                      target_ == nullptr ? "never was" : Name(target_->state));
}

VmState Machines::source_state() const {
  MutexLock lock(&mutex_);
  return source_;
}

bool Machines::MoveSource(std::initializer_list<VmState> from, VmState to) {
  MutexLock lock(&mutex_);
  if (!Contains(from, source_)) return false;
  source_ = to;
  by_hand_source_ = false;  // presync's own doing, or the end of it
  Look();
  return true;
}

absl::StatusOr<std::shared_ptr<Machines::TargetVm>> Machines::NewTarget() {
  MutexLock lock(&mutex_);
  if (target_ != nullptr &&
      (target_->state == VmState::kRunning || target_->state == VmState::kPaused)) {
    return absl::AlreadyExistsError("the guest runs on this host already");
  }
  target_ = std::make_shared<TargetVm>(kFaultRegions);
  // A late write into memory that was given up harms nobody, and must not crash the campaign.
  all_targets_.push_back(target_);
  return target_;
}

std::shared_ptr<Machines::TargetVm> Machines::target() const {
  MutexLock lock(&mutex_);
  return target_;
}

VmState Machines::state_of(const TargetVm& vm) const {
  MutexLock lock(&mutex_);
  return vm.state;
}

bool Machines::MoveTarget(TargetVm* vm, std::initializer_list<VmState> from, VmState to) {
  {
    MutexLock lock(&mutex_);
    if (!Contains(from, vm->state)) return false;
    vm->state = to;
    if (vm == target_.get()) by_hand_target_ = false;
    Look();
  }
  // What the guest writes from here on nothing may overwrite.
  if (to == VmState::kRunning) GuestWrites(/*at_source=*/false, 40);
  return true;
}

// What people and services do. --------------------------------------------------------------------

bool Machines::ContSource() {
  MutexLock lock(&mutex_);
  if (source_ != VmState::kStopped || !saved_) return false;
  source_ = VmState::kRunning;
  by_hand_source_ = true;
  return true;
}

bool Machines::ContTarget() {
  MutexLock lock(&mutex_);
  if (target_ == nullptr || target_->state != VmState::kLoaded || target_->told) return false;
  target_->state = VmState::kRunning;
  target_->untold = true;
  by_hand_target_ = true;
  return true;
}

bool Machines::PauseTarget() {
  MutexLock lock(&mutex_);
  if (target_ == nullptr || target_->state != VmState::kRunning || by_hand_target_) return false;
  target_->state = VmState::kPaused;
  return true;
}

void Machines::ContPaused() {
  MutexLock lock(&mutex_);
  if (target_ == nullptr || target_->state != VmState::kPaused) return;
  target_->state = VmState::kRunning;
  Look();
}

bool Machines::MigrateAway() {
  MutexLock lock(&mutex_);
  const bool target_has_it = target_ != nullptr && (target_->state == VmState::kRunning ||
                                                    target_->state == VmState::kPaused);
  if (source_ != VmState::kRunning || saving_ || by_hand_source_ || target_has_it || restarted_) {
    return false;
  }
  source_ = VmState::kLeft;
  elsewhere_ = true;
  return true;
}

bool Machines::StartSourceAgain() {
  MutexLock lock(&mutex_);
  // Of a move that was not presync's presync can warn nobody.
  if (source_ != VmState::kGone || restarted_ || elsewhere_) return false;
  source_ = VmState::kRunning;
  saving_ = saved_ = false;
  restarted_ = true;
  Look();
  return true;
}

void Machines::EndStrayTarget() {
  MutexLock lock(&mutex_);
  if (target_ == nullptr || !by_hand_target_) return;
  target_->state = VmState::kGone;
  by_hand_target_ = false;
}

// It runs by hand, and is to run: that is in order now.
void Machines::LetTargetRun(TargetVm* vm) {
  MutexLock lock(&mutex_);
  if (vm == target_.get()) by_hand_target_ = false;
  Look();
}

bool Machines::target_lives() const {
  MutexLock lock(&mutex_);
  return target_ != nullptr && target_->state != VmState::kGone;
}

bool Machines::RanUntold(const TargetVm& vm) const {
  MutexLock lock(&mutex_);
  return vm.untold;
}

void Machines::NoteSaving(bool saving, bool saved) {
  MutexLock lock(&mutex_);
  saving_ = saving;
  saved_ = saved;
}

void Machines::SetNote(TargetVm* vm, std::optional<CopyOwner> note) {
  MutexLock lock(&mutex_);
  vm->note = std::move(note);
}

std::optional<CopyOwner> Machines::NoteOf(const TargetVm& vm) const {
  MutexLock lock(&mutex_);
  return vm.note;
}

void Machines::NoteToldToRun(TargetVm* vm, bool told) {
  MutexLock lock(&mutex_);
  vm->told = told;
}

// Monitor. ----------------------------------------------------------------------------------------

absl::Status Monitor::Call(Life* life, const std::string& step,
                           const std::function<absl::Status()>& effect) {
  hook_(step, /*before=*/true);
  const MonitorFault fault = fault_;
  if (fault == MonitorFault::kError) {
    fault_ = MonitorFault::kNone;
    return absl::FailedPreconditionError(
        absl::StrCat(step, ": QEMU answers an error, as scripted"));
  }
  if (fault == MonitorFault::kClosed) {
    fault_ = MonitorFault::kNone;
    return absl::AbortedError(absl::StrCat(step, ": QEMU's monitor was closed, as scripted"));
  }
  if (fault == MonitorFault::kSlow) {
    fault_ = MonitorFault::kNone;
    absl::SleepFor(absl::Milliseconds(150));
  }
  absl::Status result;
  if (absl::Status s = life->Act([&] { result = effect(); }); !s.ok()) return s;
  hook_(step, /*before=*/false);
  return result;
}

namespace {

absl::Status AliveUnlessGone(VmState state) {
  return state == VmState::kGone ? absl::UnavailableError("the guest's process is gone")
                                 : absl::OkStatus();
}

absl::Status HoldSourceOf(Machines* machines, Monitor* monitor, Life* life) {
  return monitor->Call(life, "source hold-still", [machines] {
    return !machines->restarted() && machines->MoveSource({VmState::kRunning}, VmState::kStopped)
               ? absl::AbortedError("somebody resumed it: it was stopped again")
               : absl::OkStatus();
  });
}

// The source's guest. -------------------------------------------------------------------------

class FaultySource final : public SourceGuest {
 public:
  FaultySource(Machines* machines, Monitor* monitor, Life* life)
      : machines_(machines), monitor_(monitor), life_(life) {}

  absl::Status PrepareSave(absl::Time) override {
    return monitor_->Call(life_, "source prepare-save", [this] {
      if (machines_->source_state() == VmState::kLeft) {
        return absl::FailedPreconditionError("it was moved away by QEMU's own migration");
      }
      machines_->NoteSaving(/*saving=*/true, /*saved=*/false);
      return Alive();
    });
  }

  absl::StatusOr<UniqueFd> BeginSave(absl::Time) override {
    UniqueFd reader;
    const absl::Status status = monitor_->Call(life_, "source begin-save", [&] {
      if (absl::Status s = Alive(); !s.ok()) return s;
      int pair[2];
      PRESYNC_CHECK(::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair) == 0);
      stream_.reset(pair[0]);
      reader.reset(pair[1]);
      WriteAll(stream_.get(), kLiveState);
      return absl::OkStatus();
    });
    if (!status.ok()) return status;
    return reader;
  }

  absl::StatusOr<RequestLook> LookAtRequests(absl::Time) override {
    RequestLook look = {.at = MonotonicNow()};
    const absl::Status acted = life_->Act([&] {
      const absl::Duration longest = machines_->TakeLongestRead();
      if (std::exchange(looked_, true)) look.longest = longest;
    });
    if (!acted.ok()) return acted;
    return look;
  }

  absl::StatusOr<absl::Time> Stop(absl::Time) override {
    const absl::Status status = monitor_->Call(life_, "source stop", [this] {
      if (!machines_->MoveSource({VmState::kRunning}, VmState::kStopped)) return Alive();
      machines_->DrainReads();
      return absl::OkStatus();
    });
    if (!status.ok()) return status;
    return MonotonicNow();
  }

  absl::Status FinishSave(absl::Time) override {
    return monitor_->Call(life_, "source finish-save", [this] {
      if (absl::Status s = Alive(); !s.ok()) return s;
      WriteAll(stream_.get(), std::string(kStoppedStateBytes, 's'));
      stream_.reset();
      machines_->NoteSaving(/*saving=*/true, /*saved=*/true);
      return absl::OkStatus();
    });
  }

  absl::Status Resume(absl::Time) override {
    return monitor_->Call(life_, "source resume", [this] {
      stream_.reset();
      machines_->NoteSaving(/*saving=*/false, /*saved=*/false);
      machines_->MoveSource({VmState::kStopped, VmState::kRunning}, VmState::kRunning);
      return Alive();
    });
  }

  absl::Status StandsStill(absl::Time) override {
    absl::Status status;
    const absl::Status acted = life_->Act([&] {
      if (machines_->source_state() == VmState::kRunning) {
        status = absl::FailedPreconditionError("somebody resumed it after its state was saved");
      }
    });
    return acted.ok() ? status : acted;
  }

  absl::Status Quit(absl::Time) override {
    return monitor_->Call(life_, "source quit", [this] {
      machines_->MoveSource({VmState::kRunning, VmState::kStopped, VmState::kLeft}, VmState::kGone);
      return absl::OkStatus();
    });
  }

  absl::Status HoldStill(absl::Time) override { return HoldSourceOf(machines_, monitor_, life_); }

  absl::StatusOr<RunState> State(absl::Time) override {
    RunState state = RunState::kGone;
    const absl::Status status = monitor_->Call(life_, "source state", [&] {
      const VmState vm = machines_->source_state();
      state = vm == VmState::kRunning ? RunState::kRunning
              : vm == VmState::kGone  ? RunState::kGone
                                      : RunState::kPaused;
      return absl::OkStatus();
    });
    if (!status.ok()) return status;
    return state;
  }

 private:
  absl::Status Alive() const { return AliveUnlessGone(machines_->source_state()); }

  Machines* const machines_;
  Monitor* const monitor_;
  Life* const life_;
  UniqueFd stream_;
  bool looked_ = false;
};

// The guest writes at every look, so that what it writes depends on the looks alone.
class WritingLog final : public DirtyLog {
 public:
  WritingLog(Machines* machines, Life* life)
      : machines_(machines), life_(life), log_(machines->source_memory().MakeLog()) {}
  std::string_view name() const override { return "model"; }
  absl::Status Peek(std::vector<PageRun>* written) override {
    absl::Status status;
    const absl::Status acted = life_->Act([&] {
      machines_->GuestWrites(/*at_source=*/true, 3);
      status = log_->Peek(written);
    });
    return acted.ok() ? status : acted;
  }
  absl::Status Arm(absl::Span<const PageRun> runs) override {
    absl::Status status;
    const absl::Status acted = life_->Act([&] { status = log_->Arm(runs); });
    return acted.ok() ? status : acted;
  }

 private:
  Machines* const machines_;
  Life* const life_;
  const std::unique_ptr<DirtyLog> log_;
};

// The target's. -------------------------------------------------------------------------------

class FaultyTarget final : public TargetGuest {
 public:
  FaultyTarget(Machines* machines, Monitor* monitor, Life* life,
               std::shared_ptr<Machines::TargetVm> vm)
      : machines_(machines), monitor_(monitor), life_(life), vm_(std::move(vm)) {}

  absl::StatusOr<UniqueFd> BeginLoad(absl::Time) override {
    UniqueFd writer;
    const absl::Status status = monitor_->Call(life_, "target begin-load", [&] {
      if (absl::Status s = Alive(); !s.ok()) return s;
      int pair[2];
      PRESYNC_CHECK(::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair) == 0);
      stream_.reset(pair[1]);
      writer.reset(pair[0]);
      return absl::OkStatus();
    });
    if (!status.ok()) return status;
    return writer;
  }

  absl::Status AwaitLoaded(absl::Time) override {
    return monitor_->Call(life_, "target await-loaded", [this] {
      std::string state;
      char buffer[4096];
      for (ssize_t n; (n = ::read(stream_.get(), buffer, sizeof(buffer))) > 0;) {
        state.append(buffer, static_cast<size_t>(n));
      }
      if (state != WholeState())
        return absl::DataLossError("the device state is not what was saved");
      return machines_->MoveTarget(vm_.get(), {VmState::kWaiting}, VmState::kLoaded)
                 ? absl::OkStatus()
                 : Alive();
    });
  }

  absl::Status Run(absl::Time) override {
    return monitor_->Call(life_, "target run", [this] {
      PRESYNC_CHECK(machines_->state_of(*vm_) != VmState::kWaiting);
      machines_->NoteToldToRun(vm_.get(), true);
      if (machines_->MoveTarget(vm_.get(), {VmState::kLoaded}, VmState::kRunning)) {
        return absl::OkStatus();
      }
      if (machines_->state_of(*vm_) == VmState::kRunning) {
        machines_->LetTargetRun(vm_.get());
        return absl::OkStatus();
      }
      machines_->NoteToldToRun(vm_.get(), false);
      return absl::FailedPreconditionError(
          "the guest's process had ended before it was told to run");
    });
  }

  bool HasRun() override { return machines_->RanUntold(*vm_); }

  absl::Status Discard(absl::Time) override {
    return monitor_->Call(life_, "target discard", [this] {
      machines_->EndStrayTarget();
      machines_->MoveTarget(vm_.get(), {VmState::kWaiting, VmState::kLoaded}, VmState::kGone);
      machines_->NoteToldToRun(vm_.get(), false);
      return absl::OkStatus();
    });
  }

  absl::StatusOr<RunState> State(absl::Time) override {
    switch (machines_->state_of(*vm_)) {
      case VmState::kWaiting:
        return RunState::kIncoming;
      case VmState::kGone:
        return RunState::kGone;
      case VmState::kRunning:
        return RunState::kRunning;
      default:
        return RunState::kPaused;
    }
  }

 private:
  absl::Status Alive() const { return AliveUnlessGone(machines_->state_of(*vm_)); }

  Machines* const machines_;
  Monitor* const monitor_;
  Life* const life_;
  const std::shared_ptr<Machines::TargetVm> vm_;
  UniqueFd stream_;
};

class FaultyPlace final : public TargetPlace {
 public:
  FaultyPlace(Machines* machines, Monitor* monitor, Life* life,
              std::shared_ptr<Machines::TargetVm> vm)
      : machines_(machines), monitor_(monitor), life_(life), vm_(std::move(vm)) {}
  ~FaultyPlace() override {
    if (kept_) return;
    EndWaiting().IgnoreError();
    ForgetCopy().IgnoreError();
  }

  const GuestMemory& memory() const override { return vm_->memory.memory(); }
  bool memory_was_zero() const override { return true; }

  absl::StatusOr<TargetGuest*> Waiting(absl::Time) override {
    if (guest_ != nullptr && Check().ok()) return guest_.get();
    if (absl::Status s = EndWaiting(); !s.ok()) return s;
    absl::Status started = life_->Act([this] {
      machines_->MoveTarget(vm_.get(), {VmState::kGone, VmState::kWaiting, VmState::kLoaded},
                            VmState::kWaiting);
    });
    if (!started.ok()) return started;
    guest_ = std::make_unique<FaultyTarget>(machines_, monitor_, life_, vm_);
    return guest_.get();
  }

  absl::Status Check() override {
    return guest_ == nullptr || machines_->state_of(*vm_) == VmState::kWaiting
               ? absl::OkStatus()
               : absl::UnavailableError("the waiting QEMU has ended");
  }

  absl::Status EndWaiting() override {
    unknown_ |= guest_ != nullptr && machines_->state_of(*vm_) == VmState::kGone;
    guest_.reset();
    return life_->Act([this] {
      machines_->EndStrayTarget();
      machines_->MoveTarget(vm_.get(), {VmState::kWaiting, VmState::kLoaded}, VmState::kGone);
    });
  }

  bool TakeUnknown() override { return std::exchange(unknown_, false); }
  void Keep() override { kept_ = true; }
  std::string address() const override { return "the target's QEMU"; }
  std::string process() const override { return "the target's QEMU"; }

  absl::Status NoteCopy(const CopyOwner& owner) override {
    return life_->Act([&] { machines_->SetNote(vm_.get(), owner); });
  }
  absl::Status ForgetCopy() override {
    return life_->Act([this] { machines_->SetNote(vm_.get(), std::nullopt); });
  }
  void Leave() override {
    EndWaiting().IgnoreError();
    kept_ = true;
  }

 private:
  Machines* const machines_;
  Monitor* const monitor_;
  Life* const life_;
  const std::shared_ptr<Machines::TargetVm> vm_;
  std::unique_ptr<FaultyTarget> guest_;
  bool unknown_ = false;
  bool kept_ = false;
};

absl::Status EndOrphanOf(Machines* machines, Life* life) {
  absl::Status status;
  const absl::Status acted = life->Act([&] {
    const std::shared_ptr<Machines::TargetVm> vm = machines->target();
    if (vm == nullptr) return;
    if (machines->state_of(*vm) == VmState::kRunning) {
      status = absl::AlreadyExistsError("the guest runs, though nobody told it to");
      return;
    }
    machines->MoveTarget(vm.get(), {VmState::kWaiting, VmState::kLoaded, VmState::kPaused},
                         VmState::kGone);
  });
  return acted.ok() ? status : acted;
}

class FaultyHost final : public TargetHost {
 public:
  FaultyHost(Machines* machines, Monitor* monitor, Life* life, const std::atomic<bool>* no_room)
      : machines_(machines), monitor_(monitor), life_(life), no_room_(no_room) {}

  absl::StatusOr<std::unique_ptr<TargetPlace>> MakePlace(
      const std::string&, const std::vector<RegionRequest>&) override {
    if (*no_room_) return absl::ResourceExhaustedError("no room on this host, as scripted");
    std::shared_ptr<Machines::TargetVm> vm;
    absl::Status status;
    const absl::Status acted = life_->Act([&] {
      absl::StatusOr<std::shared_ptr<Machines::TargetVm>> made = machines_->NewTarget();
      if (made.ok()) {
        vm = *std::move(made);
      } else {
        status = made.status();
      }
    });
    if (!acted.ok()) return acted;
    if (!status.ok()) return status;
    return std::make_unique<FaultyPlace>(machines_, monitor_, life_, std::move(vm));
  }
  absl::Status EndOrphan(const HandoverEntry&) override { return EndOrphanOf(machines_, life_); }

  // As QemuTargetHost: a copy whose QEMU is certainly gone.
  std::vector<KeptPlace> TakeKept(
      const std::function<bool(const CopyOwner&)>& may_be_used) override {
    std::vector<KeptPlace> kept;
    const std::shared_ptr<Machines::TargetVm> vm = machines_->target();
    const std::optional<CopyOwner> owner = vm == nullptr ? std::nullopt : machines_->NoteOf(*vm);
    if (!owner) return kept;
    if (machines_->state_of(*vm) == VmState::kGone && may_be_used(*owner)) {
      kept.push_back({*owner, std::make_unique<FaultyPlace>(machines_, monitor_, life_, vm)});
    } else {
      life_->Act([&] { machines_->SetNote(vm.get(), std::nullopt); }).IgnoreError();
    }
    return kept;
  }

 private:
  Machines* const machines_;
  Monitor* const monitor_;
  Life* const life_;
  const std::atomic<bool>* const no_room_;
};

class FaultyRecovery final : public RecoveryHost {
 public:
  FaultyRecovery(Machines* machines, Monitor* monitor, Life* life, AskPeer ask)
      : machines_(machines), monitor_(monitor), life_(life), ask_(std::move(ask)) {}

  absl::Status ResumeSource(const HandoverEntry&) override {
    return monitor_->Call(life_, "recovery resume", [this] {
      machines_->NoteSaving(/*saving=*/false, /*saved=*/false);
      machines_->MoveSource({VmState::kStopped, VmState::kRunning}, VmState::kRunning);
      return absl::OkStatus();
    });
  }
  absl::Status QuitSource(const HandoverEntry&) override {
    return monitor_->Call(life_, "recovery quit", [this] {
      // Another process by now is another guest's.
      if (!machines_->restarted()) {
        machines_->MoveSource({VmState::kStopped, VmState::kRunning}, VmState::kGone);
      }
      return absl::OkStatus();
    });
  }
  absl::Status HoldSource(const HandoverEntry&) override {
    return HoldSourceOf(machines_, monitor_, life_);
  }
  absl::StatusOr<wire::Outcome> AskTarget(const HandoverEntry& entry, bool end_it) override {
    return ask_(entry, end_it);
  }
  absl::Status EndOrphan(const HandoverEntry&) override { return EndOrphanOf(machines_, life_); }
  bool OrphanLives(const HandoverEntry&) override {
    const std::shared_ptr<Machines::TargetVm> vm = machines_->target();
    return vm != nullptr && machines_->state_of(*vm) != VmState::kGone;
  }
  absl::Status RunOrphan(const HandoverEntry&) override {
    absl::Status status;
    const absl::Status acted = life_->Act([&] {
      const std::shared_ptr<Machines::TargetVm> vm = machines_->target();
      const VmState state = vm == nullptr ? VmState::kGone : machines_->state_of(*vm);
      if (state == VmState::kGone) {
        status = absl::NotFoundError("its QEMU has ended");
      } else if (state == VmState::kWaiting) {
        status = absl::FailedPreconditionError("it was told to run, but its state is not loaded");
      } else {
        machines_->MoveTarget(vm.get(), {VmState::kLoaded, VmState::kPaused}, VmState::kRunning);
        machines_->LetTargetRun(vm.get());
      }
    });
    return acted.ok() ? status : acted;
  }

 private:
  Machines* const machines_;
  Monitor* const monitor_;
  Life* const life_;
  const AskPeer ask_;
};

}  // namespace

std::unique_ptr<SourceGuest> MakeSourceGuest(Machines* machines, Monitor* monitor, Life* life) {
  return std::make_unique<FaultySource>(machines, monitor, life);
}

std::unique_ptr<DirtyLog> MakeSourceLog(Machines* machines, Life* life) {
  return std::make_unique<WritingLog>(machines, life);
}

std::unique_ptr<TargetHost> MakeTargetHost(Machines* machines, Monitor* monitor, Life* life,
                                           const std::atomic<bool>* no_room) {
  return std::make_unique<FaultyHost>(machines, monitor, life, no_room);
}

std::unique_ptr<RecoveryHost> MakeRecoveryHost(Machines* machines, Monitor* monitor, Life* life,
                                               AskPeer ask) {
  return std::make_unique<FaultyRecovery>(machines, monitor, life, std::move(ask));
}

}  // namespace presync
