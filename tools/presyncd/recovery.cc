#include "tools/presyncd/recovery.h"

#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "qemu-glue/discovery.h"
#include "qemu-glue/process_identity.h"
#include "qemu-glue/qemu_guest.h"
#include "qemu-glue/qmp/listener.h"
#include "tools/common/units.h"
#include "tools/presyncd/config.h"
#include "transport/clock.h"
#include "transport/sync/dialer.h"
#include "transport/sync/source_connection.h"

namespace presync {
namespace {

constexpr absl::Duration kTimeout = absl::Seconds(10);
constexpr absl::Duration kAgainEvery = absl::Seconds(3);
constexpr absl::Duration kHoldEvery = absl::Seconds(1);

absl::StatusOr<std::unique_ptr<QemuSourceGuest>> TryOpenQemu(const std::string& qmp_path) {
  const absl::Time deadline = MonotonicNow() + kTimeout;
  absl::StatusOr<std::unique_ptr<QmpClient>> qmp = QmpClient::Connect(qmp_path, deadline);
  if (!qmp.ok()) return qmp.status();
  return QemuSourceGuest::Create(*std::move(qmp), deadline);
}

bool IsGone(const absl::Status& status) {
  return absl::IsNotFound(status) || absl::IsUnavailable(status);
}

// A monitor that closed is asked again: only one that no living process listens at any more is a
// QEMU's that has ended. ABORTED: one does, but closes every connection.
absl::StatusOr<std::unique_ptr<QemuSourceGuest>> OpenAddress(const std::string& qmp_path) {
  absl::StatusOr<std::unique_ptr<QemuSourceGuest>> guest = TryOpenQemu(qmp_path);
  if (!IsGone(guest.status())) return guest;
  absl::SleepFor(absl::Milliseconds(200));
  guest = TryOpenQemu(qmp_path);
  if (!IsGone(guest.status()) || !ListenerLives(qmp_path)) return guest;
  return absl::AbortedError(
      absl::StrCat("its QEMU lives, but its monitor can't be used: ", guest.status().message()));
}

// The very process that the entry names; of an older presyncd's entry, whoever answers there.
// NOT_FOUND, UNAVAILABLE: it has ended. ABORTED: it lives, and can't be talked to.
absl::StatusOr<std::unique_ptr<QemuSourceGuest>> OpenQemu(const HandoverEntry& entry) {
  const ProcessIdentity process = ParseProcess(entry.process);
  if (!process.known()) return OpenAddress(entry.detail);
  const absl::Status ended =
      absl::NotFoundError(absl::StrCat("its QEMU (process ", process.pid, ") has ended"));
  if (!Lives(process)) return ended;
  absl::StatusOr<std::unique_ptr<QemuSourceGuest>> guest = OpenAddress(entry.detail);
  if (!Lives(process)) return ended;
  if (guest.ok() && (*guest)->pid() == process.pid) return guest;
  return absl::AbortedError(absl::StrCat(
      "its QEMU (process ", process.pid, ") lives, but can't be reached at ", entry.detail, ": ",
      guest.ok() ? absl::StrCat("process ", (*guest)->pid(), " answers there")
                 : guest.status().message()));
}

}  // namespace

absl::Status QemuRecoveryHost::ResumeSource(const HandoverEntry& entry) {
  absl::StatusOr<std::unique_ptr<QemuSourceGuest>> guest = OpenQemu(entry);
  if (IsGone(guest.status())) return absl::OkStatus();
  if (!guest.ok()) return guest.status();
  if (entry.phase == HandoverPhase::kTakenBack) (*guest)->NoteGivenUp();
  return (*guest)->Resume(MonotonicNow() + kTimeout);
}

// The very process that gave the guest up ends, whatever somebody did with it since. A QEMU that is
// only known by its address may be somebody else's.
absl::Status QemuRecoveryHost::QuitSource(const HandoverEntry& entry) {
  absl::StatusOr<std::unique_ptr<QemuSourceGuest>> guest = OpenQemu(entry);
  if (IsGone(guest.status())) return absl::OkStatus();
  const ProcessIdentity process = ParseProcess(entry.process);
  if (!guest.ok()) return process.known() ? EndProcess(process, kTimeout) : guest.status();
  if (!process.known()) {
    absl::StatusOr<GuestInfo> info = DescribeGuest((*guest)->qmp(), MonotonicNow() + kTimeout);
    if (!info.ok()) return info.status();
    if (info->run_state != "postmigrate") {
      return absl::FailedPreconditionError(absl::StrCat("the guest has moved to ", entry.peer,
                                                        ", but the QEMU at ", entry.detail, " is ",
                                                        info->run_state));
    }
  }
  return (*guest)->Quit(MonotonicNow() + kTimeout);
}

absl::Status QemuRecoveryHost::HoldSource(const HandoverEntry& entry) {
  if (!ParseProcess(entry.process).known()) return absl::OkStatus();
  absl::StatusOr<std::unique_ptr<QemuSourceGuest>> guest = OpenQemu(entry);
  if (IsGone(guest.status())) return absl::OkStatus();
  return guest.ok() ? (*guest)->HoldStill(MonotonicNow() + kTimeout) : guest.status();
}

absl::StatusOr<wire::Outcome> QemuRecoveryHost::AskTarget(const HandoverEntry& entry, bool end_it) {
  absl::StatusOr<HostAndPort> peer = ParseHostPort(entry.peer, kDefaultPort);
  if (!peer.ok()) return peer.status();
  TcpDialer dialer(peer->host, peer->port, security_);
  return AskOutcome(&dialer, entry.session, entry.guest, end_it, MonotonicNow() + kTimeout);
}

// Of a domain of libvirt's, and of an older presyncd's entry, it may.
bool QemuRecoveryHost::OrphanLives(const HandoverEntry& entry) {
  const ProcessIdentity process = ParseProcess(entry.process);
  return !process.known() || Lives(process);
}

RecoveryLoop::RecoveryLoop(const std::string& folder, GuestHost* host, PeerSecurity security,
                           std::shared_ptr<GuestClaims> claims,
                           std::function<void(bool problem, const std::string& line)> log)
    : host_(host, std::move(security)),
      recovery_({.folder = folder, .claims = std::move(claims), .log = log}, &host_),
      departures_(folder, log) {
  HandoverRecord::RemoveUnused(folder);
  in_use_ = [](const std::string&) { return false; };
  recovery_.PassHere(in_use_);
}

RecoveryLoop::~RecoveryLoop() {
  {
    MutexLock lock(&mutex_);
    ending_ = true;
  }
  for (std::thread& thread : threads_) thread.join();
}

// What is mute holds up nobody: hosts that are asked, QEMUs that are held still, and those that
// come up again are looked at in threads of their own.
void RecoveryLoop::Start(Recovery::InUse in_use) {
  in_use_ = std::move(in_use);
  threads_.emplace_back([this] { Every(kAgainEvery, [this] { recovery_.Pass(in_use_); }); });
  threads_.emplace_back([this] { Every(kHoldEvery, [this] { recovery_.HoldGivenUp(in_use_); }); });
  threads_.emplace_back([this] { Every(kHoldEvery, [this] { departures_.Look(in_use_); }); });
}

void RecoveryLoop::Every(absl::Duration period, const std::function<void()>& work) {
  const auto ending = [this] {
    mutex_.AssertHeld();
    return ending_;
  };
  while (true) {
    work();
    MutexLock lock(&mutex_);
    if (mutex_.AwaitWithTimeout(ending, period)) return;
  }
}

std::vector<OpenMatter> RecoveryLoop::open() const {
  std::vector<OpenMatter> all = recovery_.open();
  for (OpenMatter& matter : departures_.open()) all.push_back(std::move(matter));
  return all;
}

}  // namespace presync
