// presyncd's end of the connection to the library inside QEMU (qemu-glue/plugin).
#pragma once

#include <sys/types.h>

#include <cstdint>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "qemu-glue/plugin/glue_protocol.h"
#include "qemu-glue/process_identity.h"
#include "transport/unique_fd.h"

namespace presync {

enum class GlueMode : uint32_t {
  kAsync = PRESYNC_GLUE_MODE_ASYNC,
  kHandler = PRESYNC_GLUE_MODE_HANDLER,
};

// A range of QEMU's memory that the library tracks.
struct GlueRange {
  uint64_t start = 0;  // address in QEMU
  uint64_t bytes = 0;
  UniqueFd uffd;
  UniqueFd bitmap;  // handler mode only; see struct presync_glue_bitmap
};

// One connection. The library serves one client at a time, so holding the connection keeps another
// presyncd away. Closing it leaves everything tracked. One thread at a time may use it. Every call
// blocks until the library answered, or its deadline: DEADLINE_EXCEEDED (the connection is of no
// use then). UNAVAILABLE: QEMU, or the library, is gone. INVALID_ARGUMENT: what answers does not
// speak the protocol. Failures inside the library come back by cause:
//   UNIMPLEMENTED        the kernel can't do this mode
//   PERMISSION_DENIED    QEMU may not use userfaultfd
//   FAILED_PRECONDITION  the range is busy, or not shared memory
//   RESOURCE_EXHAUSTED   memory, descriptors, threads or ranges
//   INTERNAL             anything else
// with texts that say what to do.
class GlueClient {
 public:
  // Connects to the library inside `qemu`, and to no other process: whoever else listens at `path`,
  // which QEMU may have named, is hung up on unheard. NOT_FOUND: nothing listens at `path`.
  // FAILED_PRECONDITION: another process does, or another client is connected.
  static absl::StatusOr<GlueClient> Connect(const std::string& path, const ProcessIdentity& qemu,
                                            absl::Time deadline);

  // Asks the library to track a range, or, if it does so already in this mode, for the same
  // descriptors.
  absl::StatusOr<GlueRange> Track(uint64_t start, uint64_t bytes, GlueMode mode,
                                  absl::Time deadline);
  // FAILED_PRECONDITION: exactly this range is not tracked.
  absl::Status Untrack(uint64_t start, uint64_t bytes, absl::Time deadline);

  // A range of PRESYNC_GLUE_SCRATCH_PAGES pages that belongs to no guest, for trying a mode out.
  // The connection has at most one: making another drops it.
  absl::StatusOr<GlueRange> MakeScratch(GlueMode mode, absl::Time deadline);
  // A thread of QEMU writes to the page at `address`, and the kernel on its behalf to the next one.
  absl::Status WriteScratch(uint64_t address, absl::Time deadline);
  absl::Status DropScratch(absl::Time deadline);

  // Proves that the library is alive, and with it the process that pid() was of.
  absl::Status Ping(absl::Time deadline);

  // QEMU's process id as this process names it.
  pid_t pid() const { return pid_; }
  // The same as QEMU itself names it.
  pid_t pid_within() const { return static_cast<pid_t>(hello_.pid); }
  // UFFD_FEATURE_* of the kernel; 0 if QEMU can't get a userfaultfd by itself.
  uint64_t features() const { return hello_.features; }
  // How many ranges were tracked already when we connected.
  uint32_t ranges() const { return hello_.ranges; }

 private:
  GlueClient() = default;
  absl::StatusOr<GlueRange> CallForRange(const presync_glue_request& request, absl::Time deadline);
  absl::StatusOr<presync_glue_reply> Call(const presync_glue_request& request, int fd_to_send,
                                          UniqueFd received[2], absl::Time deadline);
  absl::StatusOr<presync_glue_reply> Receive(uint16_t type, UniqueFd received[2],
                                             absl::Time deadline);

  std::string path_;
  UniqueFd socket_;
  pid_t pid_ = 0;
  presync_glue_reply hello_ = {};
};

}  // namespace presync
