// The RDMA connection manager with deadlines and statuses.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "transport/rdma/message.h"
#include "transport/rdma/verbs.h"

namespace presync {

struct CmEvent {
  rdma_cm_event_type type = RDMA_CM_EVENT_CONNECT_ERROR;
  rdma_cm_id* id = nullptr;        // of a connect request: the new one, owned by whoever takes it
  rdma_cm_id* listener = nullptr;  // of a connect request
  int status = 0;
  std::array<uint8_t, 64> data = {};  // what the peer told with it
  size_t data_bytes = 0;
};

// Where events of connections arrive. Must outlive every CmId made on it.
class CmChannel {
 public:
  // UNIMPLEMENTED: this kernel has no connection manager, with what to load.
  static absl::StatusOr<std::unique_ptr<CmChannel>> Open();
  CmChannel(const CmChannel&) = delete;
  CmChannel& operator=(const CmChannel&) = delete;
  ~CmChannel();

  int fd() const { return channel_->fd; }  // readable: Next will not wait
  absl::StatusOr<CmId> MakeId() const;
  // Takes the next event (it is acknowledged already). DEADLINE_EXCEEDED: none in time.
  absl::StatusOr<CmEvent> Next(absl::Time deadline) const;

 private:
  explicit CmChannel(rdma_event_channel* channel) : channel_(channel) {}
  rdma_event_channel* const channel_;
};

// Listens on `id` at a numeric address, any port. UNIMPLEMENTED: no RDMA device has this address.
absl::Status ListenAt(const CmId& id, const std::string& address);

// Finds the local device and the way to a target that listens at `address`, which the id is bound
// to afterwards. `path_timeout`: after which the device gives a write up; some devices ignore it.
absl::Status Resolve(const CmChannel& channel, const CmId& id, const std::string& address,
                     uint16_t port, absl::Duration path_timeout, absl::Time deadline);

// Connects the queue pair of `id`, which was resolved. PERMISSION_DENIED: the target refused.
absl::Status ConnectId(const CmChannel& channel, const CmId& id, const ConnectData& data,
                       absl::Time deadline);

absl::Status AcceptId(const CmId& id);

inline std::string DeviceName(const CmId& id) { return ibv_get_device_name(id->verbs->device); }

}  // namespace presync
