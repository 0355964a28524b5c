// A guest that libvirt manages, on the host that it comes to: the QEMU that libvirt has started and
// told to wait. It runs when it has its whole device state and libvirt says `cont`, which libvirt
// does as soon as that is loaded. So the last byte of it is kept back: with that QEMU is given the
// guest, and without it QEMU can't run it.
#pragma once

#include <atomic>
#include <memory>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "qemu-glue/qmp/peer_process.h"
#include "qemu-glue/qmp/qmp_client.h"
#include "transport/guest.h"
#include "transport/unique_fd.h"

namespace presync {

// Passes a stream on, all but its last byte, and what comes the other way at once. Two threads of
// its own, which end with either end.
class HeldBackStream {
 public:
  // Reads from `from` until its end, writes to `to`. `on_return` is given what `to` writes.
  HeldBackStream(UniqueFd from, UniqueFd to, ReturnBytes on_return);
  ~HeldBackStream();

  // Returns when all but the last byte was written and read at the other end. UNAVAILABLE: that end
  // is gone; FAILED_PRECONDITION: the stream was empty.
  absl::Status AwaitPassed(absl::Time deadline);
  // Writes the last byte. Precondition: AwaitPassed returned ok.
  absl::Status Release();

 private:
  absl::Status Pass();
  void PassBack();

  UniqueFd from_, to_;
  UniqueFd cancel_;
  const ReturnBytes on_return_;
  std::optional<char> last_;  // the thread's until `passed_`, as status_
  absl::Status status_;
  std::atomic<bool> passed_ = false;
  std::thread back_, thread_;  // last: they use all of the above
};

class LibvirtTargetGuest final : public TargetGuest {
 public:
  // Takes over the monitor connection of a QEMU that will listen for its state at `stream_path`.
  // Errors as PeerProcess::Identify.
  static absl::StatusOr<std::unique_ptr<LibvirtTargetGuest>> Create(std::unique_ptr<QmpClient> qmp,
                                                                    std::string uri,
                                                                    std::string uuid,
                                                                    std::string stream_path,
                                                                    absl::Time deadline);

  void OnReturn(ReturnBytes on_return) override { on_return_ = std::move(on_return); }
  absl::StatusOr<UniqueFd> BeginLoad(absl::Time deadline) override;
  absl::Status AwaitLoaded(absl::Time deadline) override;
  absl::Status Run(absl::Time deadline) override;
  // Breaks the stream, at which QEMU ends or libvirt ends it; destroys the domain if neither does.
  absl::Status Discard(absl::Time deadline) override;
  absl::StatusOr<RunState> State(absl::Time deadline) override;
  bool HasRun() override;
  const PeerProcess& peer() const { return process_; }

 private:
  LibvirtTargetGuest(std::unique_ptr<QmpClient> qmp, PeerProcess process, std::string uri,
                     std::string uuid, std::string stream_path)
      : qmp_(std::move(qmp)),
        process_(std::move(process)),
        uri_(std::move(uri)),
        uuid_(std::move(uuid)),
        stream_path_(std::move(stream_path)) {}
  absl::Status SetIgnoreShared(bool on, absl::Time deadline);

  std::unique_ptr<QmpClient> qmp_;
  PeerProcess process_;
  const std::string uri_, uuid_, stream_path_;
  ReturnBytes on_return_ = [](absl::string_view) {};
  std::unique_ptr<HeldBackStream> stream_;
  bool has_run_ = false;
};

}  // namespace presync
