// The daemon: all guests that this host keeps in sync elsewhere, all guests that others keep in
// sync here, and the commands that an operator gives.
#pragma once

#include <functional>
#include <map>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/statusor.h"
#include "qemu-glue/guest_host.h"
#include "qemu-glue/open_guest.h"
#include "tools/common/units.h"
#include "tools/presyncd/config.h"
#include "tools/presyncd/fixed_costs.h"
#include "tools/presyncd/going_on.h"
#include "tools/presyncd/history.h"
#include "tools/presyncd/metrics.h"
#include "tools/presyncd/recovery.h"
#include "tools/presyncd/security.h"
#include "tools/presyncd/sync_note.h"
#include "transport/mutex.h"
#include "transport/sync/source_session.h"
#include "transport/sync/target_service.h"

namespace presync {

// One line of what an operator would want to know, into presyncd's log.
void LogLine(bool problem, const std::string& line);

// Thread-safe.
class Daemon {
 public:
  // Takes up what an earlier presyncd left open, then listens. Errors: the folders, the port.
  static absl::StatusOr<std::unique_ptr<Daemon>> Create(Config config);
  ~Daemon();

  // Answers one request of the local socket.
  nlohmann::json Handle(const nlohmann::json& request);

  // Reads the certificates again, and logs what came of it.
  void ReloadCertificates();

  // Housekeeping, and a look at every sync for history and metrics; call it about once a second.
  void Tick();

  // One line for systemd's status.
  std::string Summary() const;

 private:
  explicit Daemon(Config config);

  struct Asked {
    std::string name;
    std::string domain;  // libvirt's UUID; empty: not libvirt's
    HostAndPort to;
    OpenGuestOptions open;
    nlohmann::json order;  // SyncOrder
  };
  // A guest kept in sync from here, or one that was.
  struct Sync {
    std::shared_ptr<SourceSession> session;  // null: its start is under way
    nlohmann::json order;                    // what it was started with: SyncOrder
    // Gives its QEMU's memory free of tracking again.
    std::function<absl::Status()> stop_tracking;
  };
  using SessionOr = absl::StatusOr<std::shared_ptr<SourceSession>>;

  // daemon_start.cc: syncs begin, go on and end.
  absl::StatusOr<Asked> WhoIsAsked(const nlohmann::json& request) const;
  absl::StatusOr<SourceSessionOptions> OptionsFor(const Asked& asked);
  absl::Status CheckSettled(const std::string& name) const;
  bool AwaitNoStart(const std::string& name, absl::Duration longest)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  absl::Status Claim(const Asked& asked, absl::Duration longest,
                     std::shared_ptr<SourceSession>* running) ABSL_LOCKS_EXCLUDED(mutex_);
  void Unclaim(const std::string& name) ABSL_LOCKS_EXCLUDED(mutex_);
  SessionOr Begin(const Asked& asked, SourceSessionOptions options)
      ABSL_LOCKS_EXCLUDED(notes_mutex_, mutex_);
  absl::Status Publish(const Asked& asked, const std::shared_ptr<SourceSession>& session,
                       const OpenedGuest& opened, bool goes_on)
      ABSL_LOCKS_EXCLUDED(notes_mutex_, mutex_);
  absl::StatusOr<nlohmann::json> Start(const nlohmann::json& request);
  void GoOnWithNotes() ABSL_LOCKS_EXCLUDED(notes_mutex_);
  GoingOn::Try GoOn(const SyncNote& note);
  GoingOn::Try GiveUp(const SyncNote& note, const std::string& why)
      ABSL_LOCKS_EXCLUDED(notes_mutex_);
  void AwaitGoingOn(const std::string& name, absl::Duration longest) const;
  // Notes of syncs that have ended by themselves go.
  void ForgetEnded() ABSL_LOCKS_EXCLUDED(notes_mutex_, mutex_);
  absl::StatusOr<nlohmann::json> Stop(const nlohmann::json& request);

  void NoteManagedLaunch(const std::string& name, absl::Time ordered_at,
                         const absl::StatusOr<HandoverReport>& report);
  void NoteLaunch(const SessionStatus& status, absl::Time ordered_at,
                  const absl::StatusOr<HandoverReport>& report, bool verified);
  absl::StatusOr<nlohmann::json> Launch(const nlohmann::json& request);
  absl::StatusOr<nlohmann::json> Record(const nlohmann::json& request);
  absl::StatusOr<nlohmann::json> Settle(const nlohmann::json& request);
  absl::StatusOr<nlohmann::json> Verify(const nlohmann::json& request);
  nlohmann::json Status(const nlohmann::json& request) const;
  // Whether a session of this host has the guest in its hands.
  bool InUse(const std::string& guest) const ABSL_LOCKS_EXCLUDED(mutex_);
  std::vector<SessionStatus> Sources() const ABSL_LOCKS_EXCLUDED(mutex_);
  Metrics::View View() const ABSL_LOCKS_EXCLUDED(mutex_);
  std::vector<SessionStatus> SourcesAndWaiting() const ABSL_LOCKS_EXCLUDED(mutex_);
  std::shared_ptr<SourceSession> Find(const std::string& name) const ABSL_LOCKS_EXCLUDED(mutex_);
  // NOT_FOUND: there is none. FAILED_PRECONDITION: it does not go on yet, with why.
  SessionOr SessionOf(const std::string& name) const ABSL_LOCKS_EXCLUDED(mutex_);

  const Config config_;
  const std::shared_ptr<GuestClaims> claims_ = std::make_shared<GuestClaims>();
  std::unique_ptr<Security> security_;
  nlohmann::json qemu_users_;    // for every status
  std::vector<UniqueFd> locks_;  // on its folders, while this daemon lives
  FixedCosts fixed_costs_;
  History history_;
  std::unique_ptr<GuestHost> host_;
  std::unique_ptr<TargetService> service_;
  std::unique_ptr<RecoveryLoop> recovery_;  // after the above: it looks at them

  // A guest's note and its session change together under it.
  Mutex notes_mutex_;
  SyncNotes notes_ ABSL_GUARDED_BY(notes_mutex_);
  mutable Mutex mutex_ ABSL_ACQUIRED_AFTER(notes_mutex_);
  std::map<std::string, Sync> sources_ ABSL_GUARDED_BY(mutex_);
  GoingOn going_on_;

  const std::shared_ptr<Metrics> metrics_;
  std::unique_ptr<MetricsServer> metrics_server_;  // last: its threads look at all of the above
};

}  // namespace presync
