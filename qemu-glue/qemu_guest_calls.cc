#include "qemu-glue/qemu_guest_calls.h"

#include <sys/socket.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <utility>

#include "absl/strings/str_cat.h"
#include "transport/clock.h"

namespace presync {
namespace {

// Events tell at once; this is how soon a lost one is made up for.
constexpr absl::Duration kAskAgain = absl::Milliseconds(100);

// How long after its monitor was closed a QEMU that ends has ended.
constexpr absl::Duration kEndAfterClose = absl::Milliseconds(500);

bool IsOneOf(std::string_view status, std::initializer_list<std::string_view> list) {
  return std::find(list.begin(), list.end(), status) != list.end();
}

// The migration's state; an error if it is over and not as `wanted`.
absl::StatusOr<MigrationState> AskMigration(QmpClient& qmp, std::string_view step,
                                            std::initializer_list<std::string_view> wanted,
                                            absl::Time deadline) {
  absl::StatusOr<MigrationState> state = QueryMigration(qmp, deadline);
  if (!state.ok() || IsOneOf(state->status, wanted) || !IsMigrationOver(state->status)) {
    return state;
  }
  return absl::FailedPreconditionError(
      absl::StrCat(std::string(step), ": QEMU's migration has ended as '", state->status, "'",
                   state->error.empty() ? "; someone else may have ended it" : ": ", state->error));
}

// Ok if waiting for an event was only given up to look again; an event that says nothing new ends
// nothing, but does not prolong the waiting either.
absl::Status StillWaiting(const absl::Status& waited, std::string_view step,
                          const MigrationState& state, absl::Time deadline) {
  if (!waited.ok() && !absl::IsDeadlineExceeded(waited)) return waited;
  if (MonotonicNow() < deadline) return absl::OkStatus();
  return absl::DeadlineExceededError(
      absl::StrCat(std::string(step), ": QEMU's migration is still '", state.status, "'"));
}

}  // namespace

bool IsMigrationOver(std::string_view status) {
  return IsOneOf(status, {"none", "completed", "failed", "cancelled"});
}

absl::StatusOr<MigrationState> QueryMigration(QmpClient& qmp, absl::Time deadline) {
  absl::StatusOr<Json> answer = qmp.Execute("query-migrate", nullptr, deadline);
  if (!answer.ok()) return answer.status();
  MigrationState state{StringAt(*answer, "status"), StringAt(*answer, "error-desc")};
  if (state.status.empty()) state.status = "none";
  return state;
}

absl::StatusOr<std::string> QueryRunState(QmpClient& qmp, absl::Time deadline) {
  absl::StatusOr<Json> answer = qmp.Execute("query-status", nullptr, deadline);
  if (!answer.ok()) return answer.status();
  return RunStateOf(qmp, *answer);
}

absl::StatusOr<std::string> RunStateOf(const QmpClient& qmp, const Json& answer) {
  std::string status = StringAt(answer, "status");
  if (status.empty()) {
    return absl::InvalidArgumentError(
        absl::StrCat("QMP: ", qmp.path(), ": query-status without a status: ", ToText(answer)));
  }
  return status;
}

absl::StatusOr<RunState> QueryGuestState(QmpClient& qmp, const PeerProcess& process,
                                         absl::Time deadline) {
  if (process.HasEnded()) return RunState::kGone;
  absl::StatusOr<std::string> status = QueryRunState(qmp, deadline);
  if (!status.ok()) {
    if (absl::IsUnavailable(status.status()) && process.AwaitEnd(deadline).ok()) {
      return RunState::kGone;
    }
    return status.status();
  }
  return ToRunState(*status);
}

absl::Status ReviveMonitor(std::unique_ptr<QmpClient>* qmp, const PeerProcess& process,
                           absl::Time deadline) {
  if ((*qmp)->health().ok()) return absl::OkStatus();
  const pid_t pid = process.pid();
  // A QEMU that is ending closes its monitor first.
  const absl::Time end_known = std::min(deadline, MonotonicNow() + kEndAfterClose);
  if (process.AwaitEnd(end_known).ok()) {
    return absl::UnavailableError(absl::StrCat("QEMU (process ", pid, ") has ended"));
  }
  absl::StatusOr<std::unique_ptr<QmpClient>> again = QmpClient::Connect((*qmp)->path(), deadline);
  if (!again.ok()) {
    return absl::AbortedError(absl::StrCat("QEMU (process ", pid,
                                           ") lives, but its monitor can't "
                                           "be reached any more: ",
                                           again.status().message()));
  }
  // Both hold the number at the same time, so they are one process.
  if ((*again)->peer_pid() != pid || process.HasEnded()) {
    return absl::AbortedError(absl::StrCat("QEMU (process ", pid,
                                           ") lives, but its monitor's "
                                           "socket ",
                                           (*qmp)->path(), " is another process's now"));
  }
  *qmp = *std::move(again);
  return absl::OkStatus();
}

RunState ToRunState(std::string_view run_state) {
  if (run_state == "running") return RunState::kRunning;
  if (run_state == "inmigrate") return RunState::kIncoming;
  return RunState::kPaused;
}

absl::StatusOr<MigrationState> AwaitMigration(QmpClient& qmp, std::string_view step,
                                              std::initializer_list<std::string_view> wanted,
                                              absl::Time deadline) {
  while (true) {
    absl::StatusOr<MigrationState> state = AskMigration(qmp, step, wanted, deadline);
    if (!state.ok() || IsOneOf(state->status, wanted)) return state;
    // An event only says "look again": it may be an old one, of an earlier migration.
    absl::StatusOr<QmpEvent> event =
        qmp.WaitEvent("MIGRATION", std::min(deadline, MonotonicNow() + kAskAgain));
    if (event.ok() && MonotonicNow() < deadline) continue;
    if (absl::Status s = StillWaiting(event.status(), step, *state, deadline); !s.ok()) return s;
  }
}

absl::StatusOr<MigrationState> FollowMigration(QmpClient& qmp, std::string_view step,
                                               std::initializer_list<std::string_view> wanted,
                                               absl::Time deadline) {
  while (true) {
    absl::StatusOr<QmpEvent> event =
        qmp.WaitEvent("MIGRATION", std::min(deadline, MonotonicNow() + kAskAgain));
    if (event.ok()) {
      MigrationState told{StringAt(event->data, "status"), ""};
      if (IsOneOf(told.status, wanted)) return told;
      if (!IsMigrationOver(told.status) && MonotonicNow() < deadline) continue;
    }
    // It ended otherwise, and QEMU knows why; or nothing was heard for a while.
    absl::StatusOr<MigrationState> state = AskMigration(qmp, step, wanted, deadline);
    if (!state.ok() || IsOneOf(state->status, wanted)) return state;
    if (event.ok() && MonotonicNow() < deadline) continue;
    if (absl::Status s = StillWaiting(event.status(), step, *state, deadline); !s.ok()) return s;
  }
}

absl::StatusOr<Stream> MakeStream() {
  int ends[2];
  if (::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends) != 0) {
    return absl::ResourceExhaustedError(
        absl::StrCat("socketpair for the device state: ", std::strerror(errno)));  // NOLINT
  }
  return Stream{.ours = UniqueFd(ends[0]), .qemus = UniqueFd(ends[1])};
}

QmpCommand PassEnd(const Stream& stream, const std::string& name) {
  // QEMU replaces a descriptor that an earlier try left under this name.
  return {"getfd", {{"fdname", name}}, stream.qemus.get()};
}

// Looked at before it is asked whether it still is: then the number was not another one's yet.
ProcessIdentity IdentityOf(const PeerProcess& process) {
  const ProcessIdentity identity = IdentifyProcess(process.pid());
  return process.HasEnded() ? ProcessIdentity() : identity;
}

absl::Status EndProcess(QmpClient& qmp, const PeerProcess& process, absl::Time deadline) {
  if (process.HasEnded()) return absl::OkStatus();
  const absl::Time now = MonotonicNow();
  const absl::Time patience = deadline == absl::InfiniteFuture()
                                  ? now + absl::Minutes(1)
                                  : now + std::max(absl::ZeroDuration(), deadline - now) / 2;
  // The answer may be lost with the connection; the process's end is what counts.
  (void)qmp.Execute("quit", nullptr, patience);
  if (process.AwaitEnd(patience).ok()) return absl::OkStatus();
  if (absl::Status status = process.Kill(); !status.ok()) return status;
  return process.AwaitEnd(deadline);
}

}  // namespace presync
