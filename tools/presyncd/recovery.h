// Recovery of handovers (transport/sync/recovery.h) with this host's QEMUs, at presyncd's start and
// while it runs.
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/time/time.h"
#include "qemu-glue/guest_host.h"
#include "tools/presyncd/departure_watch.h"
#include "transport/mutex.h"
#include "transport/sync/dialer.h"
#include "transport/sync/recovery.h"

namespace presync {

// Guests by their QMP sockets and processes, targets over TCP. Any thread.
class QemuRecoveryHost final : public RecoveryHost {
 public:
  // `host` must outlive it.
  QemuRecoveryHost(GuestHost* host, PeerSecurity security)
      : host_(host), security_(std::move(security)) {}

  absl::Status ResumeSource(const HandoverEntry& entry) override;
  absl::Status QuitSource(const HandoverEntry& entry) override;
  absl::Status HoldSource(const HandoverEntry& entry) override;
  absl::StatusOr<wire::Outcome> AskTarget(const HandoverEntry& entry, bool end_it) override;
  absl::Status EndOrphan(const HandoverEntry& entry) override { return host_->EndOrphan(entry); }
  absl::Status RunOrphan(const HandoverEntry& entry) override { return host_->RunOrphan(entry); }
  bool OrphanLives(const HandoverEntry& entry) override;

 private:
  GuestHost* const host_;
  const PeerSecurity security_;
};

// Settles what an earlier presyncd left, and watches over what left this host: once when it is
// made, as far as nobody has to be asked; then every few seconds in threads of its own.
// Thread-safe.
class RecoveryLoop {
 public:
  // Goes through the records in `folder` once without asking other hosts, which blocks for some
  // seconds at most; nothing may be listening yet. `host` must outlive it.
  RecoveryLoop(const std::string& folder, GuestHost* host, PeerSecurity security,
               std::shared_ptr<GuestClaims> claims,
               std::function<void(bool problem, const std::string& line)> log);
  ~RecoveryLoop();

  // From now on again and again, but for guests that `in_use` names. It may be called from any
  // thread until this object is destroyed.
  void Start(Recovery::InUse in_use);

  std::vector<OpenMatter> open() const;

  // As Recovery::Decide.
  absl::StatusOr<std::string> Decide(const std::string& guest, const Word& word) {
    return recovery_.Decide(guest, word, in_use_);
  }

 private:
  void Every(absl::Duration period, const std::function<void()>& work);

  QemuRecoveryHost host_;
  Recovery recovery_;
  DepartureWatch departures_;
  Recovery::InUse in_use_;
  Mutex mutex_;
  bool ending_ ABSL_GUARDED_BY(mutex_) = false;
  std::vector<std::thread> threads_;  // last: they use all of the above
};

}  // namespace presync
