// A guest for tests: memory, a dirty log that is exact, and vCPUs that are stopped and resumed.
// What is checked from outside: how many of the two sides ran at any moment.
#pragma once

#include <atomic>
#include <memory>
#include <optional>
#include <random>
#include <string>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "predictor/bitmap.h"
#include "tests/transport/scratch_memory.h"
#include "transport/dirty_log.h"
#include "transport/guest.h"
#include "transport/mutex.h"

namespace presync {

// Memory with exact tracking. Thread-safe.
class ModelMemory {
 public:
  explicit ModelMemory(const std::vector<PageCount>& region_pages);

  // The guest writes a page: its bytes depend on `value` (0: the page becomes zero).
  void Write(PageIndex page, uint64_t value) ABSL_LOCKS_EXCLUDED(mutex_);
  uint64_t faults() const ABSL_LOCKS_EXCLUDED(mutex_);
  // A device fills a page by a read that was under way: its dirty log does not hear of it.
  void WriteUnseen(PageIndex page, uint64_t value) { scratch_->FillPage(page, value); }
  // How long the guest's reads take, as its devices say; none by default.
  void set_longest_read(absl::Duration longest) {
    longest_read_ns_ = absl::ToInt64Nanoseconds(longest);
  }
  absl::Duration longest_read() const { return absl::Nanoseconds(longest_read_ns_.load()); }

  ScratchMemory& scratch() { return *scratch_; }
  const GuestMemory& memory() const { return scratch_->memory(); }

  // A log over this memory, which must outlive it; no page is armed. An earlier log is not to be
  // used any more.
  std::unique_ptr<DirtyLog> MakeLog();
  // From now on the log fails: the guest's process is gone.
  void Die() { dead_ = true; }

 private:
  friend class ModelLog;
  std::unique_ptr<ScratchMemory> scratch_;
  std::atomic<bool> dead_ = false;
  std::atomic<int64_t> longest_read_ns_ = 0;
  mutable Mutex mutex_;
  PageBitmap armed_ ABSL_GUARDED_BY(mutex_);
  PageBitmap written_ ABSL_GUARDED_BY(mutex_);
  uint64_t faults_ ABSL_GUARDED_BY(mutex_) = 0;
};

// Who runs: shared by both sides of a test. Thread-safe.
class World {
 public:
  void SetRunning(bool source, bool running);
  bool source_running() const { return source_; }
  bool target_running() const { return target_; }
  bool ever_both() const { return ever_both_; }
  // Somebody else has the guest's disks: its source is refused when it would run it again.
  void set_disks_locked(bool locked) { disks_locked_ = locked; }
  bool disks_locked() const { return disks_locked_; }
  // What a look at the source guest finds, instead of whether it runs. `was_written_unseen` is told
  // once. Nothing: whether it runs.
  void set_outlook(std::optional<GuestOutlook> outlook) ABSL_LOCKS_EXCLUDED(mutex_);
  std::optional<GuestOutlook> TakeOutlook() ABSL_LOCKS_EXCLUDED(mutex_);

 private:
  Mutex mutex_;
  std::atomic<bool> source_ = true;
  std::atomic<bool> target_ = false;
  std::atomic<bool> ever_both_ = false;
  std::atomic<bool> disks_locked_ = false;
  std::optional<GuestOutlook> outlook_ ABSL_GUARDED_BY(mutex_);
};

// Which call of a model guest fails, by name: "prepare-save", "begin-save", "stop", "finish-save",
// "check-ran", "resumed-by-hand", "resume", "quit", "begin-load", "await-loaded", "runs-untold"
// (somebody runs it meanwhile), "run" (refused) and "run-unanswered" (it runs, and nobody is told).
// Empty: none.
class ModelSourceGuest final : public SourceGuest {
 public:
  // `last_page_written`: written while the state is saved, as device code may. Negative: none.
  ModelSourceGuest(World* world, ModelMemory* memory, std::string fails,
                   int64_t device_writes_page);
  ~ModelSourceGuest() override;

  absl::Status PrepareSave(absl::Time deadline) override;
  absl::StatusOr<UniqueFd> BeginSave(absl::Time deadline) override;
  absl::StatusOr<absl::Time> Stop(absl::Time deadline) override;
  absl::Status FinishSave(absl::Time deadline) override;
  absl::Status CheckRan() override { return Step("check-ran"); }
  absl::Status Resume(absl::Time deadline) override;
  absl::Status Quit(absl::Time deadline) override;
  absl::StatusOr<RunState> State(absl::Time deadline) override;
  absl::StatusOr<RequestLook> LookAtRequests(absl::Time deadline) override;
  GuestOutlook Look(absl::Time deadline) override;
  absl::Status StandsStill(absl::Time deadline) override;
  absl::Status HoldStill(absl::Time deadline) override;

 private:
  absl::Status Step(const char* name);
  World* const world_;
  ModelMemory* const memory_;
  const std::string fails_;
  const int64_t device_writes_page_;
  UniqueFd stream_;
};

class ModelTargetGuest final : public TargetGuest {
 public:
  ModelTargetGuest(World* world, std::string fails) : world_(world), fails_(std::move(fails)) {}
  // Its process ends with it, unless it was told to run.
  ~ModelTargetGuest() override {
    if (untold_) world_->SetRunning(false, false);
  }

  absl::StatusOr<UniqueFd> BeginLoad(absl::Time deadline) override;
  absl::Status AwaitLoaded(absl::Time deadline) override;
  bool HasRun() override { return untold_; }
  absl::Status Run(absl::Time deadline) override;
  absl::Status Discard(absl::Time deadline) override;
  absl::StatusOr<RunState> State(absl::Time deadline) override;

 private:
  World* const world_;
  const std::string fails_;
  UniqueFd stream_;
  bool loaded_ = false;
  bool gone_ = false;
  bool untold_ = false;
};

}  // namespace presync
