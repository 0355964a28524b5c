// A guest that libvirt manages, on the host that it leaves. libvirt drives QEMU by its own monitor:
// it says "migrate", "cont" and ends the process. presync has a second monitor, by which it watches
// that, keeps RAM out of the stream, and gets the guest's device state through a socket of its own,
// which is the migration's URI. docs/libvirt.md tells the whole.
#pragma once

#include <memory>
#include <optional>
#include <string>
#include <thread>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "qemu-glue/guest_watch.h"
#include "qemu-glue/libvirt/libvirt_client.h"
#include "qemu-glue/libvirt/saved_stream.h"
#include "qemu-glue/qmp/peer_process.h"
#include "qemu-glue/qmp/qmp_client.h"
#include "qemu-glue/request_watch.h"
#include "transport/guest.h"
#include "transport/mutex.h"
#include "transport/unique_fd.h"

namespace presync {

struct LibvirtSourceOptions {
  std::string libvirt_uri;  // this host's
  std::string uuid;
  std::string stream_path;  // where presync listens for the device state
  DomainMove move;          // what an order asks of libvirt; its stream_uri is stream_path
};

class LibvirtSourceGuest final : public SourceGuest, public ManagedLaunch {
 public:
  // Takes over the monitor connection and listens at stream_path. A capability that a presyncd that
  // died left on is taken off. UNAVAILABLE: it can't listen there; else as PeerProcess::Identify.
  static absl::StatusOr<std::unique_ptr<LibvirtSourceGuest>> Create(std::unique_ptr<QmpClient> qmp,
                                                                    LibvirtSourceOptions options,
                                                                    absl::Time deadline);
  // Takes the capability off, if the guest still lives here. An order that is not taken up yet is
  // called off; waits for its end.
  ~LibvirtSourceGuest() override;

  absl::Status PrepareSave(absl::Time deadline) override;
  absl::StatusOr<UniqueFd> BeginSave(absl::Time deadline) override;
  absl::StatusOr<absl::Time> Stop(absl::Time deadline) override;
  absl::Status FinishSave(absl::Time deadline) override;
  // Breaks the stream, which makes libvirt undo its migration, and waits for that. A guest that
  // libvirt left standing, and is done with, is resumed through libvirt.
  absl::Status Resume(absl::Time deadline) override;
  // Waits until libvirt has ended the process; destroys the domain when libvirt does not, or runs
  // it again.
  absl::Status Quit(absl::Time deadline) override;
  absl::StatusOr<RunState> State(absl::Time deadline) override;
  absl::StatusOr<RequestLook> LookAtRequests(absl::Time deadline) override;
  GuestOutlook Look(absl::Time deadline) override;
  absl::Status StandsStill(absl::Time deadline) override;
  absl::Status HoldStill(absl::Time deadline) override;
  ManagedLaunch* managed() override { return this; }

  absl::Status Expect(absl::Time deadline) override;
  void Forget() override;
  bool expected() const override { return expected_until_ != absl::InfinitePast(); }
  absl::Status Order() override;
  std::optional<absl::Status> TakeOrderEnd() override;
  bool Begun() override;
  absl::Status TakeReturn(absl::string_view bytes) override;

 private:
  LibvirtSourceGuest(std::unique_ptr<QmpClient> qmp, PeerProcess process,
                     LibvirtSourceOptions options, UniqueFd listener);
  absl::Status SetIgnoreShared(bool on, absl::Time deadline);
  absl::Status AwaitSaved(std::string_view step, std::initializer_list<std::string_view> wanted,
                          absl::Time deadline);
  bool StreamBroken() const;
  void DropStream();
  absl::StatusOr<bool> IsBack(absl::Time deadline);
  bool OrderUnderWay() const;

  std::unique_ptr<QmpClient> qmp_;
  PeerProcess process_;
  RequestWatch requests_;
  GuestWatch watch_;
  const LibvirtSourceOptions options_;
  const LibvirtClient libvirt_;
  UniqueFd listener_;                   // until the guest has moved
  UniqueFd stream_;                     // to and from QEMU, while a launch is under way
  std::unique_ptr<SavedStream> saved_;  // what comes of it
  absl::Time begun_at_ = absl::InfinitePast();
  absl::Time expected_until_ = absl::InfinitePast();

  mutable Mutex mutex_;
  bool ordering_ ABSL_GUARDED_BY(mutex_) = false;
  std::optional<absl::Status> order_end_ ABSL_GUARDED_BY(mutex_);
  std::thread order_;
};

}  // namespace presync
