#include <algorithm>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "qemu-glue/qemu_guest.h"
#include "qemu-glue/qemu_guest_calls.h"
#include "transport/clock.h"

namespace presync {
namespace {

// The stream is local; whoever reads it sets the pace. Far above any link.
constexpr uint64_t kBandwidthBytesPerS = uint64_t{1} << 40;
// QEMU's largest (MAX_MIGRATE_DOWNTIME): after one pass over what can be saved live it stops the
// guest instead of trying to converge, because only presync knows what the launch may cost.
constexpr uint64_t kDowntimeLimitMs = 2'000'000;
// QEMU announces by event that it runs the guest again; this is how soon a lost event is made up
// for.
constexpr absl::Duration kAskAgain = absl::Milliseconds(20);

constexpr char kStreamName[] = "presync-save";

const Json& SaveParameters() {
  static const Json* const parameters = new Json{{"max-bandwidth", kBandwidthBytesPerS},
                                                 {"downtime-limit", kDowntimeLimitMs},
                                                 {"mode", "normal"}};
  return *parameters;
}

absl::Status UnderWay(std::string_view state) {
  return absl::FailedPreconditionError(
      absl::StrCat("begin to save the guest: a save or another migration is under way (QEMU says '",
                   std::string(state), "'); resume the guest first, or let the other one end"));
}

}  // namespace

absl::StatusOr<std::unique_ptr<QemuSourceGuest>> QemuSourceGuest::Create(
    std::unique_ptr<QmpClient> qmp, absl::Time deadline) {
  absl::StatusOr<PeerProcess> process = PeerProcess::Identify(*qmp, deadline);
  if (!process.ok()) return process.status();
  return std::unique_ptr<QemuSourceGuest>(new QemuSourceGuest(std::move(qmp), *std::move(process)));
}

absl::Status QemuSourceGuest::EnsureMonitor(absl::Time deadline) {
  return ReviveMonitor(&qmp_, process_, deadline);
}

absl::Status QemuSourceGuest::PrepareSave(absl::Time deadline) {
  const absl::Time start = MonotonicNow();
  if (absl::Status status = EnsureMonitor(deadline); !status.ok()) return status;
  absl::StatusOr<Stream> stream = MakeStream();
  if (!stream.ok()) return stream.status();
  // All at once: a busy guest keeps QEMU's main loop waiting, for some ms with each turn.
  std::vector<QmpCommand> first = {{"query-status", nullptr}, PassEnd(*stream, kStreamName)};
  for (QmpCommand& question : MigrationSettings::Questions()) first.push_back(std::move(question));
  const absl::StatusOr<std::vector<Json>> answers = qmp_->ExecuteAll(first, deadline);
  if (!answers.ok()) return answers.status();
  const absl::StatusOr<std::string> run_state = RunStateOf(*qmp_, (*answers)[0]);
  if (!run_state.ok()) return run_state.status();
  if (absl::Status s = CheckIdle(*run_state); !s.ok()) return s;
  was_running_ = *run_state == "running";
  absl::StatusOr<MigrationSettings> settings = MigrationSettings::Plan(
      absl::MakeConstSpan(*answers).subspan(2),
      {"x-ignore-shared", "pause-before-switchover", "events"}, SaveParameters());
  if (!settings.ok()) return settings.status();
  const absl::Status set = settings->Set(*qmp_, deadline);
  if (!set.ok()) return ExplainRefusal(set, deadline);
  settings_ = *std::move(settings);
  stream_ = std::move(stream->ours);
  steps_.push_back({"prepare-save", MonotonicNow() - start});
  return absl::OkStatus();
}

absl::StatusOr<UniqueFd> QemuSourceGuest::BeginSave(absl::Time deadline) {
  if (!stream_.valid()) {
    if (absl::Status status = PrepareSave(deadline); !status.ok()) return status;
  }
  const absl::Time start = save_begun_ = MonotonicNow();
  UniqueFd stream = std::move(stream_);
  saved_ = SavedRunState();
  for (const char* event : {"MIGRATION", "STOP", "RESUME"}) qmp_->DropEvents(event);
  const absl::StatusOr<Json> started =
      qmp_->Execute("migrate", {{"uri", absl::StrCat("fd:", kStreamName)}}, deadline);
  if (started.ok()) {
    steps_.push_back({"begin-save", MonotonicNow() - start});
    return stream;
  }
  if (absl::IsFailedPrecondition(started.status())) {
    // QEMU refused, so nothing began. After any other error only Resume can tell what did.
    (void)settings_->Restore(*qmp_, deadline);
    settings_.reset();
  }
  return started.status();
}

// Whether a save can begin, as far as the run state tells: QEMU itself refuses to change
// capabilities while a migration is under way.
absl::Status QemuSourceGuest::CheckIdle(std::string_view run_state) const {
  if (settings_.has_value() || run_state == "inmigrate" || run_state == "finish-migrate") {
    return UnderWay(run_state);
  }
  if (run_state == "postmigrate") {
    return absl::FailedPreconditionError(
        "begin to save the guest: it was moved away from here by QEMU's own migration "
        "(postmigrate), and may run elsewhere: look where it runs, and never resume it here while "
        "it may; if it certainly runs nowhere, `cont` by hand");
  }
  return absl::OkStatus();
}

// Why QEMU refused the settings.
absl::Status QemuSourceGuest::ExplainRefusal(absl::Status refusal, absl::Time deadline) {
  if (!absl::IsFailedPrecondition(refusal)) return refusal;
  const absl::StatusOr<MigrationState> migration = QueryMigration(*qmp_, deadline);
  if (!migration.ok() || IsMigrationOver(migration->status)) return refusal;
  return UnderWay(migration->status);
}

// From here to the migration's end nobody can run the guest: QEMU refuses `cont`.
absl::StatusOr<absl::Time> QemuSourceGuest::Stop(absl::Time deadline) {
  const absl::Time start = MonotonicNow();
  absl::StatusOr<MigrationState> state =
      FollowMigration(*qmp_, "stop the guest", {"pre-switchover"}, deadline);
  if (!state.ok()) return state.status();
  steps_.push_back({"stop", MonotonicNow() - start});
  const absl::Time now = MonotonicNow();
  return std::max(save_begun_, TakeStopTime().value_or(now));
}

// When QEMU last said that it stopped the guest, which is some time before its migration waits;
// nothing if it did not say so since it was last asked.
std::optional<absl::Time> QemuSourceGuest::TakeStopTime() {
  const std::vector<QmpEvent> stops = qmp_->TakeEvents("STOP");
  return stops.empty() ? std::nullopt : std::optional(stops.back().at);
}

absl::Status QemuSourceGuest::FinishSave(absl::Time deadline) {
  const absl::Time start = MonotonicNow();
  absl::StatusOr<Json> go =
      qmp_->Execute("migrate-continue", {{"state", "pre-switchover"}}, deadline);
  if (!go.ok()) return go.status();
  absl::StatusOr<MigrationState> state =
      FollowMigration(*qmp_, "save the device state", {"completed"}, deadline);
  if (!state.ok()) return state.status();
  steps_.push_back({"finish-save", MonotonicNow() - start});
  return absl::OkStatus();
}

absl::Status QemuSourceGuest::CheckRan() {
  if (saved_.run_state().empty() || saved_.run_state() == "running") return absl::OkStatus();
  return absl::FailedPreconditionError(
      absl::StrCat("the guest was '", saved_.run_state(),
                   "' when it was to be stopped for the launch: somebody, or an error of its own, "
                   "paused it meanwhile. It stays here, paused; resume it and launch again"));
}

absl::Status QemuSourceGuest::Resume(absl::Time deadline) {
  absl::Status status = EnsureMonitor(deadline);
  if (status.ok()) status = TryResume(deadline);
  if (status.ok() || qmp_->health().ok()) return status;
  status = EnsureMonitor(deadline);
  if (status.ok()) status = TryResume(deadline);
  if (absl::IsUnavailable(status) && !process_.HasEnded()) {
    return absl::AbortedError(absl::StrCat("QEMU's monitor closed twice: ", status.message()));
  }
  return status;
}

absl::Status QemuSourceGuest::TryResume(absl::Time deadline) {
  const absl::Time start = MonotonicNow();
  if (!settings_.has_value()) {
    const absl::StatusOr<bool> ours = BearsOurMark(deadline);
    if (!ours.ok()) return ours.status();
    if (!*ours) return absl::OkStatus();
  }
  const absl::StatusOr<bool> completed = EndMigration(deadline);
  if (!completed.ok()) return completed.status();
  absl::StatusOr<std::string> run_state = QueryRunState(*qmp_, deadline);
  if (!run_state.ok()) return run_state.status();
  // Without a save of ours only a state that a save leaves behind is ours to undo: a guest that is
  // paused for any other reason is the operator's.
  was_running_ &= CheckRan().ok();
  const bool left_behind = *run_state == "finish-migrate" || *run_state == "postmigrate" ||
                           (given_up_ && *run_state == "paused");
  if (was_running_ && (settings_.has_value() || left_behind)) {
    if (absl::Status status = RunAgain(*completed, deadline); !status.ok()) return status;
  }
  steps_.push_back({"resume", MonotonicNow() - start});
  return RestoreSettings(deadline);
}

// Whether a save of presync's, of this object or of an earlier presyncd's, was begun and not
// undone.
absl::StatusOr<bool> QemuSourceGuest::BearsOurMark(absl::Time deadline) {
  absl::StatusOr<std::optional<MigrationSettings>> abandoned =
      MigrationSettings::FindAbandoned(*qmp_, SaveParameters(), deadline);
  if (!abandoned.ok()) return abandoned.status();
  return abandoned->has_value();
}

absl::Status QemuSourceGuest::RestoreSettings(absl::Time deadline) {
  if (!settings_.has_value()) {
    absl::StatusOr<std::optional<MigrationSettings>> abandoned =
        MigrationSettings::FindAbandoned(*qmp_, SaveParameters(), deadline);
    if (!abandoned.ok()) return abandoned.status();
    return abandoned->has_value() ? (*abandoned)->Restore(*qmp_, deadline) : absl::OkStatus();
  }
  stream_.reset();
  absl::Status restored = settings_->Restore(*qmp_, deadline);
  if (restored.ok()) settings_.reset();
  return restored;
}

// Cancels whatever migration is under way and waits until QEMU has let go of it. Whether it, or the
// last one, completed.
absl::StatusOr<bool> QemuSourceGuest::EndMigration(absl::Time deadline) {
  absl::StatusOr<MigrationState> state = QueryMigration(*qmp_, deadline);
  if (state.ok() && !IsMigrationOver(state->status)) {
    absl::StatusOr<Json> cancelled = qmp_->Execute("migrate_cancel", nullptr, deadline);
    if (!cancelled.ok()) return cancelled.status();
    state = AwaitMigration(*qmp_, "cancel the save", {"none", "completed", "failed", "cancelled"},
                           deadline);
  }
  if (!state.ok()) return state.status();
  return state->status == "completed";
}

// After a cancelled migration QEMU runs the guest by itself, a moment after it said "cancelled",
// and refuses `cont` until then; after a completed one it needs `cont`. A guest that stands still
// otherwise was paused by somebody else, and stays so: after a cancelled migration QEMU 7.2 calls
// that "postmigrate", too.
absl::Status QemuSourceGuest::RunAgain(bool completed, absl::Time deadline) {
  while (true) {
    absl::StatusOr<std::string> run_state = QueryRunState(*qmp_, deadline);
    if (!run_state.ok()) return run_state.status();
    if (*run_state == "running") return absl::OkStatus();
    const bool ours =
        (*run_state == "postmigrate" && completed) || (*run_state == "paused" && given_up_);
    if (!ours && *run_state != "finish-migrate") return absl::OkStatus();
    if (MonotonicNow() >= deadline) {
      return absl::DeadlineExceededError(
          absl::StrCat("resume the guest: QEMU is still '", *run_state, "'"));
    }
    if (ours) {
      absl::StatusOr<Json> done = qmp_->Execute("cont", nullptr, deadline);
      if (!done.ok()) return done.status();
      continue;
    }
    absl::StatusOr<QmpEvent> event =
        qmp_->WaitEvent("RESUME", std::min(deadline, MonotonicNow() + kAskAgain));
    if (!event.ok() && !absl::IsDeadlineExceeded(event.status())) return event.status();
  }
}

// QEMU refuses `cont` until its migration has completed, and takes it from then on. It says RESUME
// whenever its vCPUs begin to run, so nothing has to be asked while the guest stands still.
absl::Status QemuSourceGuest::StandsStill(absl::Time) {
  if (!qmp_->WaitEvent("RESUME", MonotonicNow()).ok()) return qmp_->health();
  return absl::FailedPreconditionError(
      absl::StrCat("somebody resumed the guest (QEMU process ", pid(),
                   ") after its state was saved: what the target has is older"));
}

absl::Status QemuSourceGuest::HoldStill(absl::Time deadline) {
  if (process_.HasEnded()) return absl::OkStatus();
  if (absl::Status s = EnsureMonitor(deadline); !s.ok()) {
    return absl::IsUnavailable(s) ? absl::OkStatus() : s;
  }
  const absl::StatusOr<std::string> run_state = QueryRunState(*qmp_, deadline);
  if (!run_state.ok()) return run_state.status();
  if (*run_state != "running") return absl::OkStatus();
  if (absl::Status s = qmp_->Execute("stop", nullptr, deadline).status(); !s.ok()) return s;
  given_up_ = true;
  return absl::AbortedError(
      absl::StrCat("somebody resumed it here (QEMU process ", pid(),
                   ") although it was given up and may run on the target: it was stopped again"));
}

absl::Status QemuSourceGuest::Quit(absl::Time deadline) {
  const absl::Time start = MonotonicNow();
  absl::Status status = EndProcess(*qmp_, process_, deadline);
  if (status.ok()) steps_.push_back({"quit", MonotonicNow() - start});
  return status;
}

absl::StatusOr<RequestLook> QemuSourceGuest::LookAtRequests(absl::Time deadline) {
  if (absl::Status status = EnsureMonitor(deadline); !status.ok()) return status;
  return requests_.Look(*qmp_, deadline);
}

absl::Status QemuSourceGuest::Kill(absl::Time deadline) {
  if (absl::Status s = process_.Kill(); !s.ok()) return s;
  return process_.AwaitEnd(deadline);
}

absl::StatusOr<RunState> QemuSourceGuest::State(absl::Time deadline) {
  if (process_.HasEnded()) return RunState::kGone;
  if (absl::Status status = EnsureMonitor(deadline); !status.ok()) {
    if (absl::IsUnavailable(status)) return RunState::kGone;
    return status;
  }
  absl::StatusOr<std::string> status = QueryRunState(*qmp_, deadline);
  if (!status.ok() && !qmp_->health().ok()) {
    if (absl::Status again = EnsureMonitor(deadline); !again.ok()) {
      if (absl::IsUnavailable(again)) return RunState::kGone;
      return again;
    }
    status = QueryRunState(*qmp_, deadline);
  }
  if (!status.ok()) return status.status();
  return ToRunState(*status);
}

GuestOutlook QemuSourceGuest::Look(absl::Time deadline) {
  return LookThrough(&qmp_, process_, &watch_, deadline);
}

}  // namespace presync
