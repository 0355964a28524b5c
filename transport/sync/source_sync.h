// The source's engine: joins dirty log, policy, pacer and link so that the target's copy of a
// running guest's memory stays close behind, and can be brought level at a launch.
#pragma once

#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "predictor/link_rate.h"
#include "predictor/policy.h"
#include "predictor/set_point.h"
#include "transport/clock.h"
#include "transport/dirty_log.h"
#include "transport/link.h"
#include "transport/memory.h"
#include "transport/sync/link_pace.h"
#include "transport/sync/page_ledger.h"
#include "transport/sync/unsettled_pages.h"

namespace presync {

struct SourceSyncOptions {
  absl::Duration scan_interval = absl::Milliseconds(100);
  absl::Duration max_launch_time = absl::Milliseconds(100);  // the promise
  absl::Duration fixed_cost = absl::Milliseconds(60);  // of a handover, until one was measured here
  uint64_t max_bytes_per_s = 0;                        // of the background sync; 0 = no cap
  std::string policy = "learned";
  // How long a read of the guest's devices is given at least before the pages that were sent
  // meanwhile are compared with their copies (unsettled_pages.h). Less than the time between two
  // looks at the requests, so that the second one after a page was sent finds it ripe.
  absl::Duration settle_after = absl::Milliseconds(1500);
  std::function<absl::Time()> now = MonotonicNow;
};

// What a person or a script sees of the sync. Counters since the session began.
struct SyncProgress {
  PageCount pages = 0;
  PageCount residual = 0;
  PageCount set_point = 0;
  PageCount unsettled = 0;  // synced, but a launch has to compare them: see unsettled_pages.h
  bool first_pass_done =
      false;  // every page was synced once, but for those that wait in the set-point
  absl::Duration predicted_launch = absl::InfiniteDuration();
  uint64_t rate_bytes_per_s = 0;     // wire bytes, over the last second
  uint64_t allowed_bytes_per_s = 0;  // by the pacer
  uint64_t link_bytes_per_s = 0;     // measured goodput, 0 = not yet
  uint64_t wire_bytes = 0;
  uint64_t pages_sent = 0;       // with payload
  uint64_t pages_zero = 0;       // as zero runs
  uint64_t write_faults = 0;     // armed pages that were written: what tracking cost the guest
  double dirty_pages_per_s = 0;  // pages seen written, over the last second
};

// One thread at a time may use it. It owns no thread and does not block, except where it takes a
// deadline. Errors: UNAVAILABLE from the link means "detach it, attach another"; the dirty log's
// errors are final.
class SourceSync {
 public:
  // `memory` and `log` must outlive it. INVALID_ARGUMENT: no such policy.
  static absl::StatusOr<std::unique_ptr<SourceSync>> Create(const GuestMemory* memory,
                                                            DirtyLog* log,
                                                            SourceSyncOptions options);

  // What the target's memory holds at the moment a link to it is attached.
  // kUnproven: an older copy of this very guest, any page of which may differ. Nothing is sent
  // before set_proven: comparing by hash finds what has to be (live_comparison.h).
  enum class TargetContent { kUnknown, kZero, kKept, kUnproven };

  // Takes note of it ahead of the link, which may fail to come up. Precondition: no link.
  void NoteContent(TargetContent content);
  // `link` must live until DetachLink.
  void AttachLink(SourceLink* link, TargetContent content);
  // Forgets the link and everything it had not confirmed.
  void DetachLink();

  // While held, nothing new is sent, and what was sent is committed: the sync becomes quiet.
  void set_held(bool held) { held_ = held; }
  // Somebody waits for the first pass: nothing is held back by the pacer.
  void set_urgent(bool urgent) { urgent_ = urgent; }
  // Whether the link has confirmed everything that was given to it.
  bool quiet() const {
    return pending_.empty() && ledger_.in_flight() == 0 && !ledger_.needs_commit() &&
           !ledger_.commit_under_way();
  }
  // Goes on over another link to the same memory. Precondition: quiet(). Ends the hold.
  void SwitchLink(SourceLink* link);

  // One step of the background sync: scans if a scan is due, adapts the pace, sends what is above
  // the set-point. Call it at least every few milliseconds while there is work.
  absl::Status Tick();

  // Whether the link has accepted work that waits for completion or back-pressure to end.
  bool busy() const { return !pending_.empty() || ledger_.in_flight() > 0; }

  // --- For a launch ---

  // Looks now, whatever the interval says.
  absl::Status Scan();
  // Finds pages that left the guest's memory and are not zero on the target: they become stale.
  // Those that are holes; and where anything was discarded of late, those that the guest has read
  // again since and are zero: these are neither holes, nor were they written.
  absl::Status FindDiscarded();
  // Sends every stale page, past set-point and pacer, and waits until the target confirmed all
  // of it. DEADLINE_EXCEEDED: not all confirmed in time.
  absl::Status Flush(absl::Time deadline);
  // Sends every stale page without waiting for completions.
  absl::Status PushAll();

  // The guest stands still and every request of its devices has ended: what is read from now on is
  // settled at once. Until the link is detached.
  void OnDrained() { drained_ = true; }
  // What would have to be compared then, as far as that is known now.
  PageBitmap Unsettled() const;
  // Then: the pages that have to be compared before the target's memory may be trusted. `last` is
  // the look that followed; stale pages are not among them, for they are sent in any case.
  PageBitmap UnsettledAtStandstill(const RequestLook& last);

  // From now on notes which pages of the target's memory are written, those that may be written yet
  // among them; see noted_writes. Begins anew at each call, and ends with the link.
  void NoteWrites();
  // Precondition: NoteWrites was called since the link was attached.
  const PageBitmap& noted_writes() const { return *noted_writes_; }

  // --- For comparisons while the guest runs (live_comparison.h) ---

  // How many looks at the dirty log there were. What was written before look N + 1 is known when
  // scans() is N + 1.
  uint64_t scans() const { return scans_; }
  // Notes from here on what touches the pages of `run`; see PageLedger::Watch. A page that is not
  // synced counts as touched.
  void Watch(PageRun run) { ledger_.Watch(run, /*stale_may=*/false); }
  // The same, for pages that are to be proven: arms the stale ones first, so that no write from
  // here on is missed, and they count as untouched. Errors as DirtyLog::Arm.
  absl::Status ArmAndWatch(PageRun run);
  // The parts of `run`, all of it watched, that were touched since.
  void AppendTouched(PageRun run, std::vector<PageRun>* out) const {
    ledger_.AppendTouched(run, out);
  }
  // The target's copies of these pages are not what they should be: they are sent again.
  void Distrust(absl::Span<const PageRun> runs) { ledger_.Distrust(runs); }
  // These pages were watched by ArmAndWatch, not touched by the newest Scan, and their bytes were
  // found equal meanwhile: they are synced. `zero`: those of them that were holes after that.
  void MarkProven(absl::Span<const PageRun> equal, absl::Span<const PageRun> zero);
  // What the guest's devices said; and whether that is worth asking.
  void OnRequestLook(const RequestLook& look) { unsettled_.OnLook(look, options_.now()); }
  bool wants_request_looks() const { return unsettled_.wants_looks(); }
  const UnsettledPages& unsettled() const { return unsettled_; }
  // These were ripe, not touched by the newest Scan since, and their bytes were found equal.
  void MarkSettled(absl::Span<const PageRun> equal) { unsettled_.OnEqual(equal); }
  // Whether the target's copy waits for its proof; set_proven ends that, whatever was proven.
  bool unproven() const { return unproven_; }
  void set_proven() { unproven_ = false; }

  PageCount residual() const { return ledger_.residual(); }
  // Of the residual, what the link has not finished with: without what only lacks its confirmation.
  PageCount unsent() const { return ledger_.stale().count() + ledger_.in_flight(); }
  // Returns when the link may have news, or at `deadline`.
  absl::Status AwaitLink(absl::Time deadline) { return link_->Wait(deadline); }
  bool all_synced() const { return ledger_.all_synced(); }
  uint64_t link_bytes_per_s() const { return link_rate_.bytes_per_s(); }
  SyncProgress progress() const;

  void set_max_launch_time(absl::Duration promise) { options_.max_launch_time = promise; }
  void set_fixed_cost(absl::Duration cost) { options_.fixed_cost = cost; }
  const SourceSyncOptions& options() const { return options_; }

 private:
  SourceSync(const GuestMemory* memory, DirtyLog* log, SourceSyncOptions options,
             std::unique_ptr<SendPolicy> policy);

  LaunchCost cost() const { return {options_.fixed_cost, link_rate_.bytes_per_s()}; }
  absl::Status FindDiscardedAndRead();
  absl::Status Collect();
  absl::Status Send(PageCount pages);
  absl::Status ArmChosen();
  absl::Status ProbeRate(absl::Time now);
  PageCount AboveGoal() const;
  absl::Status SendAboveGoal(absl::Time now);
  absl::Status Prepare(PageRun run);
  void NoteRead(PageRun run);
  void QueueNonHole(PageRun run);
  void QueueZero(PageRun run);
  absl::Status PostPending();
  absl::Status CommitIfDue(bool now);
  void BeginWith(SourceLink* link);
  void UpdateMeters(absl::Time now);

  const GuestMemory* memory_;
  DirtyLog* log_;
  SourceSyncOptions options_;
  std::unique_ptr<SendPolicy> policy_;
  LinkPace pace_;
  LinkRateEstimator link_rate_;
  std::string link_kind_;                                // whose rate that is
  std::map<std::string, LinkRateEstimator> kind_rates_;  // of kinds that were used before
  PageLedger ledger_;
  UnsettledPages unsettled_;
  std::optional<PageBitmap> noted_writes_;
  SourceLink* link_ = nullptr;

  // Pages that may be holes: those that were at the last look. A page outside it that has become
  // one since is only sent as zeros, at the price of a page that it takes up again.
  PageBitmap maybe_holes_;
  // The memory's LastDiscards(): as of a moment after which all that was discarded has been found,
  // and as of the last look, with the time since when it has been so.
  std::vector<int64_t> discards_found_, discards_seen_;
  absl::Time discards_since_ = absl::InfinitePast();
  std::deque<PageWrite> pending_;  // armed, in flight for the ledger, not yet taken by the link
  absl::Time next_scan_ = absl::InfinitePast();
  absl::Time next_hole_walk_ = absl::InfinitePast();
  absl::Time next_probe_ = absl::InfinitePast();
  bool first_pass_done_ = false;
  bool held_ = false;
  bool urgent_ = false;
  bool unproven_ = false;
  bool drained_ = false;
  uint64_t scans_ = 0;

  // The commit under way, and what it measures.
  struct CommitSample {
    absl::Time since;
    uint64_t bytes = 0;
    bool saturated = false;
  };
  CommitSample open_sample_;    // of what was posted since the last commit was posted
  CommitSample commit_sample_;  // of the commit under way
  absl::Time last_confirmed_ = absl::InfinitePast();

  // Counters of links that are gone, and meters.
  uint64_t wire_bytes_before_ = 0;
  uint64_t pages_sent_ = 0;
  uint64_t pages_zero_ = 0;
  uint64_t write_faults_ = 0;
  absl::Time meter_since_ = absl::InfinitePast();
  uint64_t meter_wire_bytes_ = 0;
  uint64_t meter_faults_ = 0;
  uint64_t rate_bytes_per_s_ = 0;
  double dirty_pages_per_s_ = 0;

  // Reused buffers.
  std::vector<PageRun> written_, to_arm_, chosen_, maybe_;
  LinkEvents events_;
};

}  // namespace presync
