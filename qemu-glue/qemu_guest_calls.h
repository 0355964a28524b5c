// The exchanges with QEMU that saving and loading have in common. Errors as QmpClient::Execute.
#pragma once

#include <initializer_list>
#include <memory>
#include <string>
#include <string_view>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "qemu-glue/process_identity.h"
#include "qemu-glue/qmp/peer_process.h"
#include "qemu-glue/qmp/qmp_client.h"
#include "transport/guest.h"
#include "transport/unique_fd.h"

namespace presync {

struct MigrationState {
  std::string status;  // QEMU's word; "none" before the first migration
  std::string error;   // why it failed, where it did
};

// A migration in this state is over, or never was.
bool IsMigrationOver(std::string_view status);

absl::StatusOr<MigrationState> QueryMigration(QmpClient& qmp, absl::Time deadline);

// query-status: "running", "paused", "inmigrate", ...
absl::StatusOr<std::string> QueryRunState(QmpClient& qmp, absl::Time deadline);

// The same as the interface's word; a process that has ended is an answer too, not an error.
absl::StatusOr<RunState> QueryGuestState(QmpClient& qmp, const PeerProcess& process,
                                         absl::Time deadline);

// What QEMU's run state comes down to.
RunState ToRunState(std::string_view run_state);

// Connects anew if the monitor's connection was lost: that says nothing about the guest, which
// answers as long as its process lives. UNAVAILABLE: `process` has ended. ABORTED: it lives, and
// its monitor can't be reached.
absl::Status ReviveMonitor(std::unique_ptr<QmpClient>* qmp, const PeerProcess& process,
                           absl::Time deadline);

// Blocks until the migration's status is one of `wanted`. FAILED_PRECONDITION: it failed or was
// cancelled, or completed, and that was not wanted; the text starts with `step` and has QEMU's
// words.
absl::StatusOr<MigrationState> AwaitMigration(QmpClient& qmp, std::string_view step,
                                              std::initializer_list<std::string_view> wanted,
                                              absl::Time deadline);

// The same for a migration that the caller began, on a connection with the capability `events`,
// after DropEvents("MIGRATION"): QEMU's events are taken at their word, so that it is not kept busy
// with questions meanwhile (its monitor reads a command byte by byte, 1 to 2 ms each under TCG).
absl::StatusOr<MigrationState> FollowMigration(QmpClient& qmp, std::string_view step,
                                               std::initializer_list<std::string_view> wanted,
                                               absl::Time deadline);

// The run state that a `query-status` answered.
absl::StatusOr<std::string> RunStateOf(const QmpClient& qmp, const Json& answer);

// A socket pair. QEMU gets its end by PassEnd, under a name (for "fd:NAME"), and may have it from
// then on: `qemus` can be closed when that was answered.
struct Stream {
  UniqueFd ours, qemus;
};
absl::StatusOr<Stream> MakeStream();
QmpCommand PassEnd(const Stream& stream, const std::string& name);

// Which process it is, for who comes later; not known() if it has ended.
ProcessIdentity IdentityOf(const PeerProcess& process);

// Asks QEMU to quit, waits for its end, and kills it when half the time is over.
absl::Status EndProcess(QmpClient& qmp, const PeerProcess& process, absl::Time deadline);

}  // namespace presync
