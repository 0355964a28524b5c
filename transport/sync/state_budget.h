// How much device state may wait in this host's memory to be loaded, of one peer and of all.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <utility>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "transport/mutex.h"

namespace presync {

// QEMU's is some hundred KB, with video RAM some tens of MB.
struct StateLimits {
  uint64_t a_peer_bytes = uint64_t{1} << 30;
  uint64_t all_bytes = uint64_t{4} << 30;
};

// Thread-safe.
class StateBudget {
 public:
  explicit StateBudget(const StateLimits& limits) : limits_(limits) {}

  // What one session holds of it, until it goes. One thread at a time.
  class Share {
   public:
    Share(StateBudget* budget, std::string peer) : budget_(budget), peer_(std::move(peer)) {}
    ~Share() { GiveBack(); }
    Share(const Share&) = delete;
    Share& operator=(const Share&) = delete;

    // So many bytes more. RESOURCE_EXHAUSTED: whose limit they are beyond.
    absl::Status Take(uint64_t bytes);
    void GiveBack();

   private:
    StateBudget* const budget_;
    const std::string peer_;  // the name in its certificate; empty: all that have none
    uint64_t bytes_ = 0;
  };

 private:
  const StateLimits limits_;
  Mutex mutex_;
  uint64_t all_ ABSL_GUARDED_BY(mutex_) = 0;
  std::map<std::string, uint64_t> peers_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace presync
