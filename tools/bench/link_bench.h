// Measures one page link: posts messages as fast as the link takes them, and says what came of it.
#pragma once

#include <cstdint>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "transport/link.h"
#include "transport/memory.h"

namespace presync {

enum class LinkPattern {
  // Messages walk through memory, each beginning where the one before it ended: as a first pass
  // does. A link may merge neighbours that it is given together.
  kContiguous,
  // Messages in random order with a page between any two, so that nothing can be merged: as the
  // dirty pages of a guest lie.
  kScattered,
};

struct LinkBenchOptions {
  uint64_t message_bytes = 64 << 10;  // whole pages
  LinkPattern pattern = LinkPattern::kContiguous;
  uint32_t depth = 128;   // messages posted and not completed; fewer if memory has room for fewer
  uint64_t messages = 0;  // how many; 0: as many as fit in `duration`
  absl::Duration duration = absl::Seconds(3);
  absl::Duration timeout = absl::Minutes(5);  // without any progress of the link
};

struct LinkBenchResult {
  uint64_t message_bytes = 0;
  uint32_t depth = 0;  // as it was used
  uint64_t messages = 0;
  // From the first post to the target's confirmation of the last message.
  absl::Duration elapsed = absl::ZeroDuration();
  // Of a message, from post to completion, so with whatever waits before it; on TCP, completed
  // means handed to the kernel. As coarse as the batches in which messages are posted and
  // completions are found.
  absl::Duration latency_p50 = absl::ZeroDuration();
  absl::Duration latency_p90 = absl::ZeroDuration();
  absl::Duration latency_p99 = absl::ZeroDuration();
  // User and system time of this process. What the kernel does for it elsewhere (interrupts, its
  // own threads) is not in it.
  absl::Duration cpu = absl::ZeroDuration();

  double seconds() const { return absl::ToDoubleSeconds(elapsed); }
  double bytes() const { return static_cast<double>(messages * message_bytes); }
  double bytes_per_s() const { return bytes() / seconds(); }
  double messages_per_s() const { return static_cast<double>(messages) / seconds(); }
  double cpu_s_per_gb() const { return absl::ToDoubleSeconds(cpu) / (bytes() / 1e9); }
};

// Blocks. Nothing else may use `link` meanwhile; `memory` is the link's, of one region. After it
// returns ok, all that was posted is confirmed, and `link` can be measured again.
// INVALID_ARGUMENT: a message is no whole number of pages, or longer than the memory; depth is 0.
// DEADLINE_EXCEEDED: the link stood still. Else the link's errors.
absl::StatusOr<LinkBenchResult> MeasureLink(SourceLink* link, const GuestMemory& memory,
                                            const LinkBenchOptions& options);

}  // namespace presync
