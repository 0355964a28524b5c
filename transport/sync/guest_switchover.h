// The guest's side of a switchover at the source, beside the sending of memory.
#pragma once

#include <atomic>
#include <optional>
#include <thread>
#include <utility>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "transport/guest.h"
#include "transport/mutex.h"
#include "transport/unique_fd.h"
#include "transport/wire/control_channel.h"

namespace presync {

// Reads the device state from the guest's stream and sends it on, in a thread of its own, for the
// guest waits for its reader while it saves.
class StateRelay {
 public:
  // `staged`: from the first byte on, for who knows not when the guest stops.
  StateRelay(UniqueFd stream, SourceGuest* guest, ControlChannel* channel, absl::Time deadline,
             bool staged)
      : stream_(std::move(stream)), staged_(staged), thread_([this, guest, channel, deadline] {
          status_ = Relay(guest, channel, deadline);
          stream_.reset();  // a guest that still saves must not wait for a reader that is gone
        }) {}
  ~StateRelay() {
    cancelled_ = true;
    if (thread_.joinable()) thread_.join();
  }

  // What is read from now on must wait at the target until the memory is complete.
  void StageFromNowOn() { staged_ = true; }

  // Waits for the end of the stream; the bytes that were sent.
  absl::StatusOr<uint64_t> Finish() {
    thread_.join();
    if (!status_.ok()) return status_;
    return bytes_;
  }

 private:
  absl::Status Relay(SourceGuest* guest, ControlChannel* channel, absl::Time deadline);

  UniqueFd stream_;
  std::atomic<bool> staged_;
  std::atomic<bool> cancelled_ = false;
  absl::Status status_;
  uint64_t bytes_ = 0;
  std::thread thread_;  // last: it uses all of the above
};

// The guest's side of the switchover, in a thread of its own, while the session's thread keeps
// sending memory: prepare, wait for Go, stop the guest, save its device state.
class GuestSwitchover {
 public:
  GuestSwitchover(SourceGuest* guest, ControlChannel* channel, absl::Time rounds_deadline,
                  absl::Duration timeout)
      : guest_(guest), channel_(channel), timeout_(timeout), thread_([this, rounds_deadline] {
          absl::Status status = Run(rounds_deadline);
          MutexLock lock(&mutex_);
          status_ = std::move(status);
          stopped_ = true;  // or failed: either way there is nothing to wait for
        }) {}

  ~GuestSwitchover() {
    {
      MutexLock lock(&mutex_);
      go_ = cancelled_ = true;
    }
    if (thread_.joinable()) thread_.join();
  }

  // Stop the guest now. Idempotent.
  void Go() {
    MutexLock lock(&mutex_);
    go_ = true;
  }

  // Whether the guest stands still, or the switchover has failed.
  bool stopped() const {
    MutexLock lock(&mutex_);
    return stopped_;
  }
  // When; nothing if it has failed.
  std::optional<absl::Time> stopped_at() const {
    MutexLock lock(&mutex_);
    return stopped_at_;
  }

  // Then: what its devices said after that.
  RequestLook last_look() const {
    MutexLock lock(&mutex_);
    return last_look_;
  }

  // Waits until the device state is saved and sent; its length. Errors also as
  // SourceGuest::CheckRan.
  absl::StatusOr<uint64_t> Finish() {
    thread_.join();
    if (!status_.ok()) return status_;
    const absl::StatusOr<uint64_t> bytes = relay_->Finish();
    const absl::Status ran = bytes.ok() ? guest_->CheckRan() : bytes.status();
    return ran.ok() ? bytes : ran;
  }

 private:
  absl::Status Run(absl::Time rounds_deadline);

  SourceGuest* const guest_;
  ControlChannel* const channel_;
  const absl::Duration timeout_;
  mutable Mutex mutex_;
  bool go_ ABSL_GUARDED_BY(mutex_) = false;
  bool cancelled_ ABSL_GUARDED_BY(mutex_) = false;
  bool stopped_ ABSL_GUARDED_BY(mutex_) = false;
  std::optional<absl::Time> stopped_at_ ABSL_GUARDED_BY(mutex_);
  RequestLook last_look_ ABSL_GUARDED_BY(mutex_);
  std::optional<StateRelay> relay_;  // the thread's, then Finish's
  absl::Status status_;              // likewise
  std::thread thread_;               // last: it uses all of the above
};

}  // namespace presync
