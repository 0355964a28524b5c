// QEMU's side of transport/guest.h: a guest that is saved from, or loaded into, a stock QEMU
// through its monitor, its RAM left out of the stream (migration capability x-ignore-shared).
#pragma once

#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "qemu-glue/guest_watch.h"
#include "qemu-glue/process_identity.h"
#include "qemu-glue/qemu_guest_settings.h"
#include "qemu-glue/qmp/peer_process.h"
#include "qemu-glue/qmp/qmp_client.h"
#include "qemu-glue/request_watch.h"
#include "qemu-glue/saved_run_state.h"
#include "transport/guest.h"

namespace presync {

// How long one step took, for logs: what an operator needs to see where a launch spent its time.
struct GuestStep {
  std::string_view name;  // "begin-save", "stop", ...
  absl::Duration took;
};

// The source. Keeps the monitor connection for its life.
//
// QEMU stops the guest by itself when nothing is left to save live: without video RAM or a running
// block migration that is some 10 ms after BeginSave. So call BeginSave no earlier than Stop can
// follow, and Stop waits for that moment.
//
// From PrepareSave on QEMU's migration settings are ours; Resume puts the operator's back.
// Whatever was found, x-ignore-shared is left off: left on, it would strip the RAM from the
// operator's own next migration.
class QemuSourceGuest final : public SourceGuest {
 public:
  ~QemuSourceGuest() override { requests_.Undo(*qmp_); }

  // Takes over the monitor connection. If that is lost while QEMU lives, PrepareSave, Resume and
  // State connect anew; a call that is under way then fails. Errors as PeerProcess::Identify.
  static absl::StatusOr<std::unique_ptr<QemuSourceGuest>> Create(std::unique_ptr<QmpClient> qmp,
                                                                 absl::Time deadline);

  // FAILED_PRECONDITION: a migration is under way already.
  absl::Status PrepareSave(absl::Time deadline) override;

  // Prepares, if that was not done. FAILED_PRECONDITION as above. The stream's other end belongs to
  // QEMU.
  absl::StatusOr<UniqueFd> BeginSave(absl::Time deadline) override;
  absl::StatusOr<absl::Time> Stop(absl::Time deadline) override;
  absl::Status FinishSave(absl::Time deadline) override;
  void OnSaved(absl::string_view bytes) override { saved_.Take(bytes); }
  absl::Status CheckRan() override;

  // A guest that did not run when it was stopped to be saved stays stopped; QEMU (7.2 always, later
  // ones after a completed save) can then save it again only after a `cont`. On an object that did
  // not begin the save (presyncd was restarted, or QEMU refused to prepare it) it looks for
  // presync's own mark first, x-ignore-shared: without it whatever QEMU does is somebody else's,
  // and nothing is touched. With it a save that an earlier presyncd left behind is ended, the guest
  // runs (there is no telling whether it was paused before), and what can be known of the settings
  // is put back.
  absl::Status Resume(absl::Time deadline) override;

  // Asks QEMU to quit and, after half the time, kills it.
  absl::Status Quit(absl::Time deadline) override;
  // Kills it at once: it does nothing to its memory any more. Ok: it has ended.
  absl::Status Kill(absl::Time deadline);
  absl::StatusOr<RunState> State(absl::Time deadline) override;
  GuestOutlook Look(absl::Time deadline) override;

  absl::StatusOr<RequestLook> LookAtRequests(absl::Time deadline) override;
  absl::Status StandsStill(absl::Time deadline) override;
  absl::Status HoldStill(absl::Time deadline) override;

  // A record says that the guest was given up: Resume runs it also where it was only held still.
  void NoteGivenUp() { given_up_ = true; }

  pid_t pid() const { return process_.pid(); }
  QmpClient& qmp() { return *qmp_; }
  // Steps since Create, oldest first.
  const std::vector<GuestStep>& steps() const { return steps_; }

 private:
  QemuSourceGuest(std::unique_ptr<QmpClient> qmp, PeerProcess process)
      : qmp_(std::move(qmp)), process_(std::move(process)), watch_(process_.pid()) {}
  absl::Status EnsureMonitor(absl::Time deadline);
  absl::Status TryResume(absl::Time deadline);
  absl::Status CheckIdle(std::string_view run_state) const;
  absl::Status ExplainRefusal(absl::Status refusal, absl::Time deadline);
  std::optional<absl::Time> TakeStopTime();
  absl::StatusOr<bool> EndMigration(absl::Time deadline);
  absl::Status RunAgain(bool completed, absl::Time deadline);
  absl::Status RestoreSettings(absl::Time deadline);
  absl::StatusOr<bool> BearsOurMark(absl::Time deadline);

  std::unique_ptr<QmpClient> qmp_;
  PeerProcess process_;
  GuestWatch watch_;
  bool was_running_ = true;  // when the save was prepared, and when the guest was stopped for it
  SavedRunState saved_;      // what was saved last
  bool given_up_ = false;    // and held still, or to be resumed as one that was
  absl::Time save_begun_ = absl::InfinitePast();  // the guest ran until then, if it ran
  std::optional<MigrationSettings> settings_;     // set from PrepareSave until Resume
  UniqueFd stream_;                               // set from PrepareSave until BeginSave
  RequestWatch requests_;
  std::vector<GuestStep> steps_;
};

// The target: a QEMU started with `-incoming defer -S`. Keeps the monitor connection for its life.
class QemuTargetGuest final : public TargetGuest {
 public:
  // Takes over the monitor connection. FAILED_PRECONDITION: QEMU waits for no migration, or it was
  // started without -S; else as PeerProcess::Identify.
  static absl::StatusOr<std::unique_ptr<QemuTargetGuest>> Create(std::unique_ptr<QmpClient> qmp,
                                                                 absl::Time deadline);

  // Does what BeginLoad would take time for, at most once. From then on QEMU ends by itself when
  // this object goes away before it has loaded: its stream has ended.
  absl::Status PrepareLoad(absl::Time deadline);

  absl::StatusOr<UniqueFd> BeginLoad(absl::Time deadline) override;
  absl::Status StayPaused(absl::Time deadline) override;
  bool HasRun() override;

  // INTERNAL: the guest runs although nobody ran it. UNAVAILABLE: QEMU ended, as it does when it
  // can't load the state; its log says why.
  absl::Status AwaitLoaded(absl::Time deadline) override;

  // Ok is QEMU's word that it resumes the vCPUs, given just before it does. Also has the guest's
  // network cards announce themselves, without waiting for it.
  absl::Status Run(absl::Time deadline) override;

  // Asks QEMU to quit and, after half the time, kills it.
  absl::Status Discard(absl::Time deadline) override;
  absl::StatusOr<RunState> State(absl::Time deadline) override;

  pid_t pid() const { return process_.pid(); }
  const ProcessIdentity& identity() const { return identity_; }
  const PeerProcess& peer() const { return process_; }
  QmpClient& qmp() { return *qmp_; }
  const std::vector<GuestStep>& steps() const { return steps_; }

 private:
  QemuTargetGuest(std::unique_ptr<QmpClient> qmp, PeerProcess process, ProcessIdentity identity)
      : qmp_(std::move(qmp)), process_(std::move(process)), identity_(std::move(identity)) {}

  std::unique_ptr<QmpClient> qmp_;
  PeerProcess process_;
  const ProcessIdentity identity_;
  std::optional<MigrationSettings> settings_;  // set from PrepareLoad until Run
  bool has_run_ = false;                       // before it was told to
  UniqueFd stream_;                            // set from PrepareLoad until BeginLoad
  std::vector<GuestStep> steps_;
};

}  // namespace presync
