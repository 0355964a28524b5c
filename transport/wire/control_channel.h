// The control connection: framed protobuf messages over one connection.
#pragma once

#include <string>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "transport/mutex.h"
#include "transport/tls/connection.h"
#include "transport/wire/control.pb.h"

namespace presync {

// Frames larger than this are refused before anything is allocated for them.
inline constexpr uint32_t kMaxControlFrameBytes = 1 << 20;
// A frame that has begun and is not whole after so long never will be: its length is damaged, or
// whoever sends it wants the reader to wait.
inline constexpr absl::Duration kLongestControlFrame = absl::Seconds(15);
// Device state travels in pieces of at most this.
inline constexpr uint32_t kMaxStateChunkBytes = 256 << 10;

// A frame is a u32 little-endian length and that many bytes of a ControlMessage. Any thread may
// Send; one thread at a time may Receive. Any failure but a deadline in Receive is final.
class ControlChannel {
 public:
  // Takes a connection; `peer` names the other side in error texts.
  ControlChannel(Connection connection, std::string peer,
                 absl::Duration longest_frame = kLongestControlFrame);
  ~ControlChannel();
  ControlChannel(const ControlChannel&) = delete;
  ControlChannel& operator=(const ControlChannel&) = delete;

  const std::string& peer() const { return peer_; }
  // The name in the other side's certificate; empty: a plain connection.
  std::string peer_name() const { return connection_.peer_name(); }
  // The numeric address, without a port, of this end; empty for a socket that is not IP's.
  std::string local_address() const;

  // Blocks until the message is handed to the kernel, or until `deadline` when the peer does not
  // read. UNAVAILABLE: the connection is gone. UNAUTHENTICATED: the other side does not believe
  // this host's certificate, and says so only now. DEADLINE_EXCEEDED: final too, part of a frame
  // may be out.
  absl::Status Send(const wire::ControlMessage& message, absl::Time deadline);

  // Waits for one message. DEADLINE_EXCEEDED: none yet, ask again. UNAVAILABLE, UNAUTHENTICATED:
  // as above. INVALID_ARGUMENT: not a frame of this protocol, one that is too long, or one that
  // does not end.
  absl::StatusOr<wire::ControlMessage> Receive(absl::Time deadline);

  // Wakes whoever is blocked in Send or Receive, with UNAVAILABLE. Any thread.
  void Shutdown();

 private:
  absl::Status Gone(const absl::Status& why) const;
  absl::Status FillTo(size_t bytes, absl::Time deadline);

  Connection connection_;
  const std::string peer_;
  Mutex send_mutex_;
  absl::Status send_status_ ABSL_GUARDED_BY(send_mutex_);
  const absl::Duration longest_frame_;
  std::string received_;    // bytes of a frame that is not whole yet
  absl::Time frame_began_;  // if there are any
};

}  // namespace presync
