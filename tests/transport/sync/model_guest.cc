#include "tests/transport/sync/model_guest.h"

#include <sys/socket.h>
#include <unistd.h>

#include <string>
#include <utility>

#include "predictor/check.h"
#include "transport/clock.h"

namespace presync {
namespace {

// What a device state looks like here: a live part and a part saved after the stop.
const char kLiveState[] = "live state;";
const std::string& StoppedState() {
  static const std::string state(300'000, 's');
  return state;
}

std::unique_ptr<ScratchMemory> MakeScratch(const std::vector<PageCount>& region_pages) {
  absl::StatusOr<std::unique_ptr<ScratchMemory>> scratch = ScratchMemory::Create(region_pages);
  PRESYNC_CHECK(scratch.ok());
  return *std::move(scratch);
}

void WriteAll(int fd, const char* data, size_t size) {
  while (size > 0) {
    const ssize_t n = ::send(fd, data, size, MSG_NOSIGNAL);
    if (n <= 0) return;
    data += n;
    size -= static_cast<size_t>(n);
  }
}

}  // namespace

class ModelLog final : public DirtyLog {
 public:
  explicit ModelLog(ModelMemory* model) : model_(model) {}
  std::string_view name() const override { return "model"; }

  absl::Status Peek(std::vector<PageRun>* written) override {
    if (model_->dead_) return absl::UnavailableError("the guest's process is gone");
    MutexLock lock(&model_->mutex_);
    for (const PageRun& run : model_->memory().SplitAtRegions({0, model_->memory().pages()})) {
      model_->written_.AppendRunsWithin(run, written);
    }
    model_->written_.ClearAll();
    return absl::OkStatus();
  }

  absl::Status Arm(absl::Span<const PageRun> runs) override {
    if (model_->dead_) return absl::UnavailableError("the guest's process is gone");
    MutexLock lock(&model_->mutex_);
    for (const PageRun& run : runs) {
      if (!model_->memory().IsWithinOneRegion(run)) {
        return absl::InvalidArgumentError("a run crosses regions");
      }
      model_->armed_.Set(run);
      model_->written_.Clear(run);
    }
    return absl::OkStatus();
  }

 private:
  ModelMemory* const model_;
};

ModelMemory::ModelMemory(const std::vector<PageCount>& region_pages)
    : scratch_(MakeScratch(region_pages)),
      armed_(scratch_->memory().pages()),
      written_(scratch_->memory().pages()) {}

void ModelMemory::Write(PageIndex page, uint64_t value) {
  MutexLock lock(&mutex_);
  if (armed_.Clear({page, 1}) > 0) {
    written_.Set({page, 1});
    ++faults_;
  }
  if (value == 0) {
    scratch_->ZeroPage(page);
  } else {
    scratch_->FillPage(page, value);
  }
}

uint64_t ModelMemory::faults() const {
  MutexLock lock(&mutex_);
  return faults_;
}

std::unique_ptr<DirtyLog> ModelMemory::MakeLog() {
  MutexLock lock(&mutex_);
  armed_.ClearAll();
  written_.ClearAll();
  return std::make_unique<ModelLog>(this);
}

void World::SetRunning(bool source, bool running) {
  MutexLock lock(&mutex_);
  (source ? source_ : target_) = running;
  if (source_ && target_) ever_both_ = true;
}

void World::set_outlook(std::optional<GuestOutlook> outlook) {
  MutexLock lock(&mutex_);
  outlook_ = std::move(outlook);
}

std::optional<GuestOutlook> World::TakeOutlook() {
  MutexLock lock(&mutex_);
  std::optional<GuestOutlook> taken = outlook_;
  if (outlook_) outlook_->was_written_unseen = false;
  return taken;
}

ModelSourceGuest::ModelSourceGuest(World* world, ModelMemory* memory, std::string fails,
                                   int64_t device_writes_page)
    : world_(world),
      memory_(memory),
      fails_(std::move(fails)),
      device_writes_page_(device_writes_page) {}

ModelSourceGuest::~ModelSourceGuest() = default;

absl::Status ModelSourceGuest::Step(const char* name) {
  return fails_ == name ? absl::FailedPreconditionError(std::string(name) + " fails as scripted")
                        : absl::OkStatus();
}

absl::Status ModelSourceGuest::PrepareSave(absl::Time) { return Step("prepare-save"); }

absl::StatusOr<UniqueFd> ModelSourceGuest::BeginSave(absl::Time) {
  if (absl::Status s = Step("begin-save"); !s.ok()) return s;
  int pair[2];
  PRESYNC_CHECK(::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair) == 0);
  stream_.reset(pair[0]);
  WriteAll(stream_.get(), kLiveState, sizeof(kLiveState) - 1);
  return UniqueFd(pair[1]);
}

absl::StatusOr<absl::Time> ModelSourceGuest::Stop(absl::Time) {
  if (absl::Status s = Step("stop"); !s.ok()) return s;
  world_->SetRunning(true, false);
  return MonotonicNow();
}

absl::Status ModelSourceGuest::FinishSave(absl::Time) {
  if (absl::Status s = Step("finish-save"); !s.ok()) return s;
  WriteAll(stream_.get(), StoppedState().data(), StoppedState().size());
  if (device_writes_page_ >= 0) {
    memory_->Write(static_cast<PageIndex>(device_writes_page_), 0xdec0de);
  }
  stream_.reset();
  return absl::OkStatus();
}

absl::Status ModelSourceGuest::Resume(absl::Time) {
  stream_.reset();
  if (world_->disks_locked()) return absl::FailedPreconditionError("its disks are locked");
  world_->SetRunning(true, true);
  return absl::OkStatus();
}

absl::Status ModelSourceGuest::Quit(absl::Time) {
  world_->SetRunning(true, false);
  return Step("quit");
}

absl::Status ModelSourceGuest::StandsStill(absl::Time) {
  if (fails_ == "resumed-by-hand") world_->SetRunning(true, true);
  return world_->source_running() ? absl::FailedPreconditionError("resumed-by-hand, as scripted")
                                  : absl::OkStatus();
}

absl::Status ModelSourceGuest::HoldStill(absl::Time) {
  if (!world_->source_running()) return absl::OkStatus();
  world_->SetRunning(true, false);
  return absl::AbortedError("somebody resumed it: it was stopped again");
}

absl::StatusOr<RunState> ModelSourceGuest::State(absl::Time) {
  return world_->source_running() ? RunState::kRunning : RunState::kPaused;
}

absl::StatusOr<RequestLook> ModelSourceGuest::LookAtRequests(absl::Time) {
  return RequestLook{.at = MonotonicNow(), .longest = memory_->longest_read()};
}

GuestOutlook ModelSourceGuest::Look(absl::Time deadline) {
  const std::optional<GuestOutlook> scripted = world_->TakeOutlook();
  return scripted ? *scripted : SourceGuest::Look(deadline);
}

absl::StatusOr<UniqueFd> ModelTargetGuest::BeginLoad(absl::Time) {
  if (fails_ == "begin-load") return absl::UnavailableError("begin-load fails as scripted");
  int pair[2];
  PRESYNC_CHECK(::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair) == 0);
  // Room for all of the state: nobody reads before AwaitLoaded.
  const int bytes = 1 << 20;
  ::setsockopt(pair[0], SOL_SOCKET, SO_SNDBUFFORCE, &bytes, sizeof(bytes));
  stream_.reset(pair[1]);
  return UniqueFd(pair[0]);
}

absl::Status ModelTargetGuest::AwaitLoaded(absl::Time) {
  if (fails_ == "runs-untold") {
    untold_ = true;
    world_->SetRunning(false, true);
    return absl::InternalError("runs-untold, as scripted");
  }
  if (fails_ == "await-loaded") return absl::UnavailableError("await-loaded fails as scripted");
  std::string state;
  char buffer[4096];
  for (ssize_t n; (n = ::read(stream_.get(), buffer, sizeof(buffer))) > 0;) {
    state.append(buffer, static_cast<size_t>(n));
  }
  loaded_ = state == kLiveState + StoppedState();
  return loaded_ ? absl::OkStatus() : absl::DataLossError("the device state is not what was saved");
}

absl::Status ModelTargetGuest::Run(absl::Time) {
  PRESYNC_CHECK(loaded_ && !gone_);
  if (fails_ == "run") return absl::FailedPreconditionError("run fails as scripted");
  world_->SetRunning(false, true);
  if (fails_ == "run-unanswered") return absl::UnavailableError("run-unanswered, as scripted");
  return absl::OkStatus();
}

absl::Status ModelTargetGuest::Discard(absl::Time) {
  gone_ = true;
  return absl::OkStatus();
}

absl::StatusOr<RunState> ModelTargetGuest::State(absl::Time) {
  if (gone_) return RunState::kGone;
  return loaded_ ? RunState::kPaused : RunState::kIncoming;
}

}  // namespace presync
