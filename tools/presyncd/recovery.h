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
#include "qemu-glue/guest_host.h"
#include "transport/mutex.h"
#include "transport/sync/dialer.h"
#include "transport/sync/recovery.h"

namespace presync {

// Guests by their QMP sockets, targets over TCP. One thread at a time.
class QemuRecoveryHost final : public RecoveryHost {
 public:
  // `host` must outlive it.
  QemuRecoveryHost(GuestHost* host, PeerSecurity security)
      : host_(host), security_(std::move(security)) {}

  absl::Status ResumeSource(const HandoverEntry& entry) override;
  absl::Status QuitSource(const HandoverEntry& entry) override;
  absl::StatusOr<wire::Outcome> AskTarget(const HandoverEntry& entry) override;
  absl::Status EndOrphan(const std::string& address) override { return host_->EndOrphan(address); }
  absl::Status RunOrphan(const std::string& address) override { return host_->RunOrphan(address); }

 private:
  GuestHost* const host_;
  const PeerSecurity security_;
};

// Settles what an earlier presyncd left: once when it is made, then every few seconds in a thread
// of its own. Thread-safe.
class RecoveryLoop {
 public:
  // Goes through the records in `folder` once, which blocks for some seconds at most for each open
  // one; nothing may be listening yet. `host` must outlive it.
  RecoveryLoop(const std::string& folder, GuestHost* host, PeerSecurity security,
               std::function<void(bool problem, const std::string& line)> log);
  ~RecoveryLoop();

  // From now on again and again, but for guests that `in_use` names. It may be called from any
  // thread until this object is destroyed.
  void Start(Recovery::InUse in_use);

  std::vector<OpenMatter> open() const { return recovery_.open(); }

  // As Recovery::Decide.
  absl::Status Decide(const std::string& guest, Decision decision) {
    return recovery_.Decide(guest, decision, in_use_);
  }

 private:
  void Run();

  QemuRecoveryHost host_;
  Recovery recovery_;
  Recovery::InUse in_use_;
  Mutex mutex_;
  bool ending_ ABSL_GUARDED_BY(mutex_) = false;
  std::thread thread_;  // last: it uses all of the above
};

}  // namespace presync
