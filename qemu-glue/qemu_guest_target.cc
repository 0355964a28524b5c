#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "qemu-glue/discovery_devices.h"
#include "qemu-glue/qemu_guest.h"
#include "qemu-glue/qemu_guest_calls.h"
#include "transport/clock.h"

namespace presync {
namespace {

// How long after its monitor was closed a QEMU that ends has ended.
constexpr absl::Duration kEndAfterClose = absl::Seconds(5);

constexpr char kStreamName[] = "presync-load";

// QEMU's own defaults for the announcement after a migration (initial, max, step in ms).
const Json& Announcement() {
  static const Json* const arguments =
      new Json{{"initial", 50}, {"max", 550}, {"rounds", 5}, {"step", 100}};
  return *arguments;
}

}  // namespace

absl::StatusOr<std::unique_ptr<QemuTargetGuest>> QemuTargetGuest::Create(
    std::unique_ptr<QmpClient> qmp, absl::Time deadline) {
  absl::StatusOr<PeerProcess> process = PeerProcess::Identify(*qmp, deadline);
  if (!process.ok()) return process.status();
  absl::StatusOr<std::string> run_state = QueryRunState(*qmp, deadline);
  if (!run_state.ok()) return run_state.status();
  if (*run_state != "inmigrate") {
    return absl::FailedPreconditionError(
        absl::StrCat("target guest: QEMU at ", qmp->path(), " is '", *run_state,
                     "', not waiting for a guest; start it with -incoming defer -S"));
  }
  absl::StatusOr<std::vector<std::string>> arguments = process->CommandLine();
  if (!arguments.ok()) return arguments.status();
  if (!HasStoppedOption(*arguments)) {
    return absl::FailedPreconditionError(absl::StrCat(
        "target guest: QEMU at ", qmp->path(), " (process ", process->pid(),
        ") was started without -S, so it would run the guest as soon as it is loaded, while the "
        "source may still have it; start it with -incoming defer -S"));
  }
  ProcessIdentity identity = IdentityOf(*process);
  return std::unique_ptr<QemuTargetGuest>(
      new QemuTargetGuest(std::move(qmp), *std::move(process), std::move(identity)));
}

absl::Status QemuTargetGuest::PrepareLoad(absl::Time deadline) {
  const absl::Time start = MonotonicNow();
  if (settings_.has_value()) {
    return absl::FailedPreconditionError(
        "begin to load the guest: already begun; discard this QEMU");
  }
  // While it waits for a migration this only says "don't run at its end", like -S: a `cont` that
  // someone sent meanwhile is taken back.
  absl::StatusOr<Json> done = qmp_->Execute("stop", nullptr, deadline);
  if (!done.ok()) return done.status();
  // late-block-activate: QEMU takes the disks' locks at `cont`, not now, so that the source can
  // resume.
  absl::StatusOr<MigrationSettings> settings = MigrationSettings::Apply(
      *qmp_, {"x-ignore-shared", "late-block-activate", "events"}, {{"mode", "normal"}}, deadline);
  if (!settings.ok()) return settings.status();
  settings_ = *std::move(settings);
  absl::StatusOr<Stream> stream = MakeStream();
  if (!stream.ok()) return stream.status();
  qmp_->DropEvents("MIGRATION");
  qmp_->DropEvents("RESUME");
  const absl::StatusOr<std::vector<Json>> begun =
      qmp_->ExecuteAll({PassEnd(*stream, kStreamName),
                        {"migrate-incoming", {{"uri", absl::StrCat("fd:", kStreamName)}}}},
                       deadline);
  if (!begun.ok()) return begun.status();
  stream_ = std::move(stream->ours);
  steps_.push_back({"prepare-load", MonotonicNow() - start});
  return absl::OkStatus();
}

absl::StatusOr<UniqueFd> QemuTargetGuest::BeginLoad(absl::Time deadline) {
  if (!stream_.valid()) {
    if (absl::Status status = PrepareLoad(deadline); !status.ok()) return status;
  }
  return std::move(stream_);
}

absl::Status QemuTargetGuest::StayPaused(absl::Time deadline) {
  return qmp_->Execute("stop", nullptr, deadline).status();
}

// QEMU says RESUME whenever its vCPUs begin to run.
bool QemuTargetGuest::HasRun() {
  has_run_ = has_run_ || qmp_->WaitEvent("RESUME", MonotonicNow()).ok();
  return has_run_;
}

absl::Status QemuTargetGuest::AwaitLoaded(absl::Time deadline) {
  const absl::Time start = MonotonicNow();
  absl::StatusOr<MigrationState> state =
      FollowMigration(*qmp_, "load the device state", {"completed"}, deadline);
  if (absl::IsUnavailable(state.status())) {
    return absl::UnavailableError(absl::StrCat(
        "load the device state: QEMU ended; its log says why (", state.status().message(), ")"));
  }
  if (!state.ok()) return state.status();
  absl::StatusOr<std::string> run_state = QueryRunState(*qmp_, deadline);
  if (!run_state.ok()) return run_state.status();
  has_run_ = has_run_ || *run_state == "running";
  if (HasRun()) {
    return absl::InternalError(
        absl::StrCat("THE TARGET GUEST RAN although presync did not run it (QEMU process ",
                     process_.pid(), "): someone sent `cont` while it was loaded"));
  }
  if (*run_state != "paused") {
    return absl::FailedPreconditionError(
        absl::StrCat("load the device state: the guest arrived '", *run_state, "', not 'paused'"));
  }
  steps_.push_back({"load", MonotonicNow() - start});
  return absl::OkStatus();
}

absl::Status QemuTargetGuest::Run(absl::Time deadline) {
  const absl::Time start = MonotonicNow();
  if (process_.HasEnded()) {
    return absl::FailedPreconditionError(
        absl::StrCat("QEMU (process ", pid(), ") had ended before it was told to run the guest"));
  }
  // QEMU says RESUME when nothing can keep the vCPUs from running any more; its reply waits until
  // they let go of its main lock, 7 to 20 ms later under TCG (tools/demo, 2026-11-24).
  absl::StatusOr<bool> resumed = qmp_->ExecuteUntil("cont", nullptr, "RESUME", deadline);
  if (!resumed.ok()) {
    // A QEMU that was killed may take a while to end.
    const absl::Time ended_by = std::min(deadline, MonotonicNow() + kEndAfterClose);
    if (qmp_->command_unread() && process_.AwaitEnd(ended_by).ok()) {
      return absl::FailedPreconditionError(absl::StrCat(
          "QEMU (process ", pid(), ") ended before it read the order to run the guest"));
    }
    return resumed.status();
  }
  if (!*resumed) {
    absl::StatusOr<std::string> run_state = QueryRunState(*qmp_, deadline);
    // Whatever is wrong now: it was not the order that was refused.
    if (!run_state.ok() || *run_state != "running") {
      return absl::InternalError(absl::StrCat(
          "run the guest: QEMU took `cont` but ",
          run_state.ok() ? absl::StrCat("is '", *run_state, "'") : run_state.status().message()));
    }
  }
  steps_.push_back({"run", MonotonicNow() - start});
  // The guest runs: neither of these may turn that into an error or keep anyone waiting.
  (void)qmp_->Post("announce-self", Announcement(), deadline);
  if (settings_.has_value()) (void)settings_->PostRestore(*qmp_, deadline);
  return absl::OkStatus();
}

absl::Status QemuTargetGuest::Discard(absl::Time deadline) {
  (void)HasRun();
  return EndProcess(*qmp_, process_, deadline);
}

absl::StatusOr<RunState> QemuTargetGuest::State(absl::Time deadline) {
  return QueryGuestState(*qmp_, process_, deadline);
}

}  // namespace presync
