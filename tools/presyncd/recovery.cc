#include "tools/presyncd/recovery.h"

#include <utility>

#include "absl/strings/str_cat.h"
#include "qemu-glue/discovery.h"
#include "qemu-glue/qemu_guest.h"
#include "tools/common/units.h"
#include "tools/presyncd/config.h"
#include "transport/sync/dialer.h"
#include "transport/sync/handover_record.h"
#include "transport/sync/source_connection.h"

namespace presync {
namespace {

constexpr absl::Duration kTimeout = absl::Seconds(10);

absl::StatusOr<std::unique_ptr<QemuSourceGuest>> OpenQemu(const std::string& qmp_path) {
  const absl::Time deadline = absl::Now() + kTimeout;
  absl::StatusOr<std::unique_ptr<QmpClient>> qmp = QmpClient::Connect(qmp_path, deadline);
  if (!qmp.ok()) return qmp.status();
  return QemuSourceGuest::Create(*std::move(qmp), deadline);
}

// The guest is this host's: it goes on if the handover had stopped it. A QEMU that is gone has
// nothing to go on with, and nothing is open either.
absl::Status ResumeHere(const HandoverEntry& entry) {
  absl::StatusOr<std::unique_ptr<QemuSourceGuest>> guest = OpenQemu(entry.detail);
  if (absl::IsNotFound(guest.status()) || absl::IsUnavailable(guest.status())) {
    return absl::OkStatus();
  }
  return guest.ok() ? (*guest)->Resume(absl::Now() + kTimeout) : guest.status();
}

// The guest has moved: its old QEMU ends. Only one that stands where a finished handover leaves it;
// a QEMU that was started anew at the same socket is somebody else's.
absl::Status QuitHere(const HandoverEntry& entry) {
  absl::StatusOr<std::unique_ptr<QemuSourceGuest>> guest = OpenQemu(entry.detail);
  if (absl::IsNotFound(guest.status()) || absl::IsUnavailable(guest.status())) {
    return absl::OkStatus();
  }
  if (!guest.ok()) return guest.status();
  absl::StatusOr<GuestInfo> info = DescribeGuest((*guest)->qmp(), absl::Now() + kTimeout);
  if (!info.ok()) return info.status();
  if (info->run_state != "postmigrate") {
    return absl::FailedPreconditionError(
        absl::StrCat("the guest has moved to ", entry.peer, ", but the QEMU at ", entry.detail,
                     " is ", info->run_state, ": if it is the same guest, end it by hand at once"));
  }
  return (*guest)->Quit(absl::Now() + kTimeout);
}

absl::Status SettleGivenUp(const HandoverEntry& entry, const PeerSecurity& security) {
  absl::StatusOr<HostAndPort> peer = ParseHostPort(entry.peer, kDefaultPort);
  if (!peer.ok()) return peer.status();
  TcpDialer dialer(peer->host, peer->port, security);
  absl::StatusOr<wire::Outcome> outcome =
      AskOutcome(&dialer, entry.session, entry.guest, absl::Now() + kTimeout);
  if (!outcome.ok()) {
    return absl::Status(outcome.status().code(),
                        absl::StrCat("given up to ", entry.peer,
                                     ", which can't be asked: ", outcome.status().message(),
                                     "; bring its presyncd back and restart this one"));
  }
  switch (outcome->value()) {
    case wire::Outcome::RUNNING:
      return QuitHere(entry);
    case wire::Outcome::NEVER_RAN:
      return ResumeHere(entry);
    default:
      return absl::FailedPreconditionError(absl::StrCat(
          "given up to ", entry.peer, ", which answers: ", outcome->text(),
          ". Look whether the guest runs there; if it certainly does not, resume it here "
          "(QMP cont at ",
          entry.detail, ")"));
  }
}

absl::Status Settle(const HandoverEntry& entry, QemuTargetHost* host,
                    const PeerSecurity& security) {
  switch (entry.phase) {
    case HandoverPhase::kPreparing:
    case HandoverPhase::kTakenBack:
      return ResumeHere(entry);
    case HandoverPhase::kGivenUp:
      return SettleGivenUp(entry, security);
    case HandoverPhase::kMoved:
      return QuitHere(entry);
    case HandoverPhase::kWaiting:
      return host->EndOrphan(entry.detail);
    case HandoverPhase::kToldToRun:
      return host->RunOrphan(entry.detail);
    case HandoverPhase::kRunning:
    case HandoverPhase::kNeverRan:
      return absl::OkStatus();
  }
  return absl::OkStatus();
}

// The phase that the record ends with; the source's records end by going away.
absl::Status Close(const std::string& folder, const HandoverEntry& entry) {
  absl::StatusOr<HandoverRecord> record = HandoverRecord::Open(folder, entry);
  if (!record.ok()) return record.status();
  if (entry.role == HandoverRole::kSource) return record->Remove();
  return record->Append(entry.phase == HandoverPhase::kWaiting ? HandoverPhase::kNeverRan
                                                               : HandoverPhase::kRunning);
}

}  // namespace

std::vector<std::string> RecoverHandovers(
    const std::string& folder, QemuTargetHost* host, const PeerSecurity& security,
    const std::function<void(bool problem, const std::string& line)>& log) {
  HandoverRecord::RemoveUnused(folder);
  std::vector<std::string> open;
  const auto unsettled = [&](const std::string& line) {
    log(true, line);
    open.push_back(line);
  };
  std::vector<std::string> unreadable;
  for (const HandoverEntry& entry : HandoverRecord::ReadAll(folder, &unreadable)) {
    if (entry.phase == HandoverPhase::kRunning || entry.phase == HandoverPhase::kNeverRan) continue;
    absl::Status status = Settle(entry, host, security);
    if (status.ok()) status = Close(folder, entry);
    const std::string what = absl::StrCat(entry.guest, ": an earlier presyncd left it ",
                                          PhaseName(entry.phase), " (peer ", entry.peer, ")");
    if (status.ok()) {
      log(false, absl::StrCat(what, "; settled"));
    } else {
      unsettled(absl::StrCat(what, "; ", status.message()));
    }
  }
  for (const std::string& path : unreadable) {
    unsettled(absl::StrCat("the handover record ", path,
                           " can't be read; look at both hosts before "
                           "removing it"));
  }
  return open;
}

}  // namespace presync
