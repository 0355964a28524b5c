// How a sync went on after its link, or a presyncd, had gone: what had to be sent again.
#pragma once

#include <cstdint>

#include "absl/strings/string_view.h"
#include "absl/time/time.h"
#include "predictor/page.h"
#include "transport/sync/source_sync.h"

namespace presync {

enum class ResumedFrom {
  kNothing,  // the target had no memory of it, or none that could be used: all is sent again
  kLedger,   // the target kept the memory, and here it is known what of it is right
  kCopy,     // the target kept the memory; hashes tell what of it is right
};

absl::string_view ResumedFromName(ResumedFrom from);

struct ResumptionStatus {
  uint32_t count = 0;  // all of them; the rest is about the last one
  ResumedFrom from = ResumedFrom::kNothing;
  absl::Time at = absl::InfinitePast();
  PageCount stale_pages = 0;  // that the resumption found to be sent, in flight ones included
  uint64_t wire_bytes = 0;    // of memory sent until it had caught up ...
  uint64_t hash_bytes = 0;    // ... and of hashes
  bool caught_up = false;     // what is left is within the set-point
  uint64_t all_bytes = 0;     // of both, of all resumptions
};

// Not thread-safe: the session thread's.
class ResumptionMeter {
 public:
  // A link is attached; `again`: not the session's first. The first counts if it found a copy.
  void OnAttached(SourceSync::TargetContent content, bool again, const SourceSync& sync,
                  uint64_t hash_bytes, absl::Time now);
  // Looks at where it is; call it now and then. `hash_bytes`: all of the session's so far.
  void Look(const SourceSync& sync, uint64_t hash_bytes);
  const ResumptionStatus& status() const { return status_; }

 private:
  ResumptionStatus status_;
  bool counting_ = false;
  bool stale_known_ = false;
  uint64_t all_before_ = 0;
  uint64_t wire_before_ = 0;
  uint64_t hash_before_ = 0;
};

}  // namespace presync
