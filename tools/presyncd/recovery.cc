#include "tools/presyncd/recovery.h"

#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "qemu-glue/discovery.h"
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
absl::StatusOr<std::unique_ptr<QemuSourceGuest>> OpenQemu(const std::string& qmp_path) {
  absl::StatusOr<std::unique_ptr<QemuSourceGuest>> guest = TryOpenQemu(qmp_path);
  if (!IsGone(guest.status())) return guest;
  absl::SleepFor(absl::Milliseconds(200));
  guest = TryOpenQemu(qmp_path);
  if (!IsGone(guest.status()) || !ListenerLives(qmp_path)) return guest;
  return absl::AbortedError(
      absl::StrCat("its QEMU lives, but its monitor can't be used: ", guest.status().message()));
}

}  // namespace

absl::Status QemuRecoveryHost::ResumeSource(const HandoverEntry& entry) {
  absl::StatusOr<std::unique_ptr<QemuSourceGuest>> guest = OpenQemu(entry.detail);
  if (IsGone(guest.status())) return absl::OkStatus();
  return guest.ok() ? (*guest)->Resume(MonotonicNow() + kTimeout) : guest.status();
}

// A QEMU that was started anew at the same socket is somebody else's.
absl::Status QemuRecoveryHost::QuitSource(const HandoverEntry& entry) {
  absl::StatusOr<std::unique_ptr<QemuSourceGuest>> guest = OpenQemu(entry.detail);
  if (IsGone(guest.status())) return absl::OkStatus();
  if (!guest.ok()) return guest.status();
  absl::StatusOr<GuestInfo> info = DescribeGuest((*guest)->qmp(), MonotonicNow() + kTimeout);
  if (!info.ok()) return info.status();
  if (info->run_state != "postmigrate") {
    return absl::FailedPreconditionError(absl::StrCat("the guest has moved to ", entry.peer,
                                                      ", but the QEMU at ", entry.detail, " is ",
                                                      info->run_state));
  }
  return (*guest)->Quit(MonotonicNow() + kTimeout);
}

absl::StatusOr<wire::Outcome> QemuRecoveryHost::AskTarget(const HandoverEntry& entry) {
  absl::StatusOr<HostAndPort> peer = ParseHostPort(entry.peer, kDefaultPort);
  if (!peer.ok()) return peer.status();
  TcpDialer dialer(peer->host, peer->port, security_);
  return AskOutcome(&dialer, entry.session, entry.guest, MonotonicNow() + kTimeout);
}

RecoveryLoop::RecoveryLoop(const std::string& folder, GuestHost* host, PeerSecurity security,
                           std::function<void(bool problem, const std::string& line)> log)
    : host_(host, std::move(security)),
      recovery_({.folder = folder, .log = std::move(log)}, &host_) {
  HandoverRecord::RemoveUnused(folder);
  in_use_ = [](const std::string&) { return false; };
  recovery_.Pass(in_use_);
}

RecoveryLoop::~RecoveryLoop() {
  {
    MutexLock lock(&mutex_);
    ending_ = true;
  }
  if (thread_.joinable()) thread_.join();
}

void RecoveryLoop::Start(Recovery::InUse in_use) {
  in_use_ = std::move(in_use);
  thread_ = std::thread([this] { Run(); });
}

void RecoveryLoop::Run() {
  while (true) {
    {
      MutexLock lock(&mutex_);
      const auto ending = [this] {
        mutex_.AssertHeld();
        return ending_;
      };
      if (mutex_.AwaitWithTimeout(ending, kAgainEvery)) return;
    }
    recovery_.Pass(in_use_);
  }
}

}  // namespace presync
