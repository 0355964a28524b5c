// The target's host for QEMU guests: makes a guest's memory, starts the QEMU that waits for it from
// this host's own command template, or attaches to one that waits already.
#pragma once

#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "qemu-glue/copy_note.h"
#include "qemu-glue/guest_notes.h"
#include "qemu-glue/qemu_process.h"
#include "qemu-glue/qemu_user.h"
#include "transport/mutex.h"
#include "transport/sync/target_host.h"

namespace presync {

// How a guest that comes is run here. Exactly one of the two is set.
struct TargetGuestConfig {
  // The QEMU command, run without a shell. Replaced in each argument: {ram.ID} by the file of the
  // memory backend ID, {qmp} by the monitor's socket, {glue} by the plug-in's, {folder} by a folder
  // where this QEMU may make files, {name} by the guest's name.
  // `-incoming defer` and `-S` are added where they are missing.
  std::vector<std::string> command;
  std::string user;  // whom that QEMU runs as, a name or a number; empty: QemuUserConfig decides
  // The monitor socket of a QEMU that waits with `-incoming defer -S`.
  std::string attach_qmp;
};

// What can be told of it without a guest: a plain name that leaves room for its sockets in
// `run_folder`, and a command that can work: {qmp} is in it, there is no placeholder that means
// nothing, and QEMU stays the process that was started. INVALID_ARGUMENT, with what to change.
absl::Status CheckGuestConfig(const std::string& name, const TargetGuestConfig& guest,
                              const std::string& run_folder);

struct QemuTargetHostOptions {
  std::string ram_folder;        // tmpfs or hugetlbfs; memory files are made here
  std::string run_folder;        // sockets, logs and notes about guests that run
  uint64_t max_guest_bytes = 0;  // 0: what the host has
  std::map<std::string, TargetGuestConfig> guests;
  QemuUsers users;  // whom their QEMUs run as
  // Called with one line whenever an operator would want to know. Any thread.
  std::function<void(bool problem, const std::string& line)> log = [](bool, const std::string&) {};
};

// Thread-safe. See TargetHost for the errors of MakePlace.
class QemuTargetHost final : public TargetHost {
 public:
  // Makes the folders (mode 0700). UNAVAILABLE: it can't. FAILED_PRECONDITION: as MakeOwnFolder.
  static absl::StatusOr<std::unique_ptr<QemuTargetHost>> Create(QemuTargetHostOptions options);

  absl::StatusOr<std::unique_ptr<TargetPlace>> MakePlace(
      const std::string& guest, const std::vector<RegionRequest>& regions) override;
  absl::Status EndOrphan(const HandoverEntry& entry) override;
  // Waits some seconds for QEMUs and a presyncd that are still ending. A copy is whole if its files
  // are the very ones, its presyncd has ended, and none of its QEMUs lives.
  std::vector<KeptPlace> TakeKept(
      const std::function<bool(const CopyOwner&)>& may_be_used) override;

  // For recovery after presyncd was restarted, once the handover records were looked at: ends QEMUs
  // that still wait for their state (they never ran) and removes what they held.
  void EndWaitingLeftovers();

  // Runs a guest that had been told to run when presyncd ended. Ok if it runs. NOT_FOUND: its QEMU
  // has ended. FAILED_PRECONDITION: it is not in a state to be run, with which.
  absl::Status RunOrphan(const HandoverEntry& entry);

  // Removes memory files and sockets of guests that ran here and have ended, and cuts logs that
  // have grown too long. Call it now and then.
  void RemoveLeftovers() ABSL_LOCKS_EXCLUDED(mutex_);

  // Takes the process of a guest that runs here now, to notice (and reap) its end.
  void Adopt(QemuProcess process) ABSL_LOCKS_EXCLUDED(mutex_);

  // Whom the guest's next QEMU runs as. Errors as QemuUsers::Choose.
  absl::StatusOr<std::optional<ProcessUser>> UserOf(const std::string& guest)
      ABSL_LOCKS_EXCLUDED(mutex_);
  const std::string& run_folder() const { return options_.run_folder; }

 private:
  explicit QemuTargetHost(QemuTargetHostOptions options) : options_(std::move(options)) {}
  void RemoveEnded(const GuestNote& note, const std::set<std::string>& copied);
  absl::StatusOr<std::unique_ptr<TargetPlace>> TakeUp(const CopyNote& note);

  const QemuTargetHostOptions options_;
  Mutex mutex_;
  std::vector<QemuProcess> running_ ABSL_GUARDED_BY(mutex_);
  std::map<std::string, uid_t> users_ ABSL_GUARDED_BY(mutex_);  // given so far, by guest
};

}  // namespace presync
