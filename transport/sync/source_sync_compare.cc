// What the engine does for comparisons of the two copies while the guest runs.
#include <vector>

#include "transport/sync/source_sync.h"

namespace presync {

// Only stale pages: arming a synced one would forget a write that no look has seen yet.
absl::Status SourceSync::ArmAndWatch(PageRun run) {
  std::vector<PageRun> stale, pieces;
  ledger_.stale().AppendRunsWithin(run, &stale);
  for (const PageRun& each : stale) {
    for (const PageRun& piece : memory_->SplitAtRegions(each)) pieces.push_back(piece);
  }
  if (absl::Status s = log_->Arm(pieces); !s.ok()) return s;
  ledger_.Watch(run, /*stale_may=*/true);
  return absl::OkStatus();
}

void SourceSync::MarkProven(absl::Span<const PageRun> equal, absl::Span<const PageRun> zero) {
  std::vector<PageRun> newly;
  for (const PageRun& run : equal) ledger_.stale().AppendRunsWithin(run, &newly);
  for (const PageRun& run : newly) {
    ledger_.MarkSynced(run);
    NoteRead(run);
  }
  for (const PageRun& run : zero) {
    ledger_.MarkTargetZero(run);
    unsettled_.Forget(run);  // it was a hole after it was armed: no request has it
  }
  // As good as sent: armed, and the target has it.
  policy_->OnSent(newly);
}

}  // namespace presync
