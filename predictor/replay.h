// Replays a recorded trace through a policy, as a sync would live through it, and counts what that
// costs. docs/prediction.md, "Replay", says what each figure means.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>

#include "absl/time/time.h"
#include "predictor/page.h"
#include "predictor/policy.h"
#include "predictor/set_point.h"
#include "predictor/trace.h"

namespace presync {

struct ReplayOptions {
  PageCount set_point = 0;
  // For the predicted launch times. With a known rate a scan sends no more than the link carries in
  // a scan interval; with rate 0 all above the set-point goes at once.
  LaunchCost cost;
  // CPU time used so far by the calling thread, for `policy_cpu`. Without it no time is measured.
  std::function<absl::Duration()> cpu_time;
};

struct ReplayResult {
  uint64_t scans = 0;
  uint64_t pages_written = 0;  // over all scans, whether seen or not
  uint64_t pages_sent = 0;
  uint64_t write_faults = 0;  // armed pages that were written
  // Of the residual after each scan's sending; the percentile by nearest rank.
  double residual_mean_pages = 0;
  PageCount residual_p95_pages = 0;
  PageCount residual_max_pages = 0;
  // InfiniteDuration if the rate is unknown.
  absl::Duration launch_mean = absl::InfiniteDuration();
  absl::Duration launch_p95 = absl::InfiniteDuration();
  // In the policy's own calls, without what reading the clock costs.
  absl::Duration policy_cpu = absl::ZeroDuration();
};

// It begins with everything synced and armed: the first copy of a guest costs every policy the
// same, so it is not counted. Each scan: the armed pages that were written fault, become stale and
// unarmed; the policy says which to arm; what is above its goal is chosen, armed and synced.
// Precondition (CHECKed): the policy is fresh, for trace.header().pages pages.
ReplayResult Replay(const Trace& trace, SendPolicy& policy, const ReplayOptions& options);

// Belady's rule with the whole trace known: sends the stale page whose next write is farthest away,
// ties by lowest address. No policy sends fewer pages at the same set-point. `trace` must outlive
// it; it works for a replay of that trace only.
std::unique_ptr<SendPolicy> MakeOptimum(const Trace& trace);

// Told how often each page is written within `within` scans before and after each moment, and
// nothing else: sends the stale page with the fewest writes, ties by the oldest. Were the writes
// memoryless, with rates that hold that long, no policy that does not know when they come could
// send fewer (Aho, Denning and Ullman, "Principles of Optimal Page Replacement", JACM 1971).
// `trace` must outlive it; it works for a replay of that trace only.
std::unique_ptr<SendPolicy> MakeKnownRates(const Trace& trace, size_t within);

// What the two baselines of docs/prediction.md send, by plain counting: every written page in every
// scan, and every page written in a second at the end of that second.
uint64_t EveryScanPages(const Trace& trace);
uint64_t OnceASecondPages(const Trace& trace);

// Whole scans in a second, at least 1.
uint32_t ScansPerSecond(const TraceHeader& header);

}  // namespace presync
