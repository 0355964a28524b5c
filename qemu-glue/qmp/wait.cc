#include "qemu-glue/qmp/wait.h"

#include <algorithm>
#include <cerrno>

#include "transport/clock.h"

namespace presync {

bool WaitReady(int fd, short events, absl::Time deadline) {
  pollfd entry = {fd, events, 0};
  while (true) {
    // An hour at most in one wait, so that a deadline in the infinite future fits poll's argument.
    const absl::Duration left =
        std::clamp(deadline - MonotonicNow(), absl::ZeroDuration(), absl::Hours(1));
    const timespec timeout = absl::ToTimespec(left);
    const int ready = ::ppoll(&entry, 1, &timeout, nullptr);
    if (ready > 0) return true;
    if (ready < 0 && errno != EINTR) return true;  // let the caller's own call name the error
    if (ready == 0 && MonotonicNow() >= deadline) return false;
  }
}

}  // namespace presync
