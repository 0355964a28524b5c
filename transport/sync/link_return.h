// Bringing up an RDMA link beside the TCP link that carries the sync meanwhile.
#pragma once

#include <atomic>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/time/time.h"
#include "transport/mutex.h"
#include "transport/rdma/rdma_link.h"
#include "transport/wire/control_channel.h"

namespace presync {

// One try: OpenLink is sent when it is made; feed it what the target says about that link. What is
// slow, registering memory and connecting, goes on in a thread of its own. One thread at a time may
// use it; nothing blocks but the destructor, which waits for that thread to give up.
class LinkReturn {
 public:
  // `memory` must outlive it.
  LinkReturn(const GuestMemory* memory, RdmaSourceOptions options, uint32_t number,
             ControlChannel* channel);
  ~LinkReturn();

  uint32_t number() const { return number_; }

  // A message about this link (LinkOf in link_messages.h).
  void OnMessage(const wire::ControlMessage& message);

  // Why the try has failed; ok while it goes on, and when it is ready.
  absl::Status status() const ABSL_LOCKS_EXCLUDED(mutex_);
  // Whether both ends are up.
  bool ready() const ABSL_LOCKS_EXCLUDED(mutex_);
  // Precondition: ready().
  RdmaSource Take() ABSL_LOCKS_EXCLUDED(mutex_);

  // Gives up, without waiting for it.
  void Abandon() { abandoned_ = true; }

 private:
  void Connect(const RdmaOffer& offer) ABSL_LOCKS_EXCLUDED(mutex_);
  void Fail(const absl::Status& why) ABSL_LOCKS_EXCLUDED(mutex_);

  const GuestMemory* const memory_;
  RdmaSourceOptions options_;
  const uint32_t number_;
  const std::string peer_;
  const absl::Time deadline_;
  std::atomic<bool> abandoned_ = false;
  mutable Mutex mutex_;
  absl::Status status_ ABSL_GUARDED_BY(mutex_);
  RdmaSource link_ ABSL_GUARDED_BY(mutex_);
  bool target_ready_ ABSL_GUARDED_BY(mutex_) = false;
  std::thread thread_;  // last: it uses the above
};

}  // namespace presync
