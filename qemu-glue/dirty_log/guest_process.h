// QEMU's process, as seen through /proc.
#pragma once

#include <sys/types.h>

#include <cstdint>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "qemu-glue/dirty_log/glue_client.h"
#include "transport/unique_fd.h"

namespace presync {

// Holds /proc/PID/pagemap open, which refers to that process's memory for ever: a later process
// that is given the same number is never looked at by mistake.
class GuestProcess {
 public:
  // The process at the other end of `client`. FAILED_PRECONDITION: another one answers there.
  // PERMISSION_DENIED: no right to look at its memory. UNAVAILABLE: it is gone.
  static absl::StatusOr<GuestProcess> Open(GlueClient* client, absl::Time deadline);

  absl::StatusOr<GuestProcess> Duplicate() const;

  pid_t pid() const { return pid_; }
  int pagemap() const { return pagemap_.get(); }
  // The text of /proc/PID/maps when it was opened.
  const std::string& maps() const { return maps_; }

  // UNAVAILABLE: the process has ended. `address`: any in its range of user addresses. About 1 us.
  absl::Status CheckAlive(uint64_t address) const;

  // Whether the page at `address` is write-protected through userfaultfd just now. UNAVAILABLE as
  // above.
  absl::StatusOr<bool> IsProtected(uint64_t address) const;

 private:
  GuestProcess() = default;
  pid_t pid_ = 0;
  UniqueFd pagemap_;
  std::string maps_;
};

}  // namespace presync
