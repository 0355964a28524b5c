#include "transport/sync/resumption.h"

namespace presync {

absl::string_view ResumedFromName(ResumedFrom from) {
  switch (from) {
    case ResumedFrom::kNothing:
      return "nothing";
    case ResumedFrom::kLedger:
      return "ledger";
    case ResumedFrom::kCopy:
      return "copy";
  }
  return "unknown";
}

void ResumptionMeter::OnAttached(SourceSync::TargetContent content, bool again,
                                 const SourceSync& sync, uint64_t hash_bytes, absl::Time now) {
  using Content = SourceSync::TargetContent;
  if (!again && content != Content::kUnproven) return;
  all_before_ = status_.all_bytes;
  wire_before_ = sync.progress().wire_bytes;
  hash_before_ = hash_bytes;
  status_ = {.count = status_.count + 1, .from = ResumedFrom::kNothing, .at = now};
  status_.all_bytes = all_before_;
  if (content == Content::kKept) status_.from = ResumedFrom::kLedger;
  if (content == Content::kUnproven || sync.unproven()) status_.from = ResumedFrom::kCopy;
  counting_ = true;
  stale_known_ = false;
}

void ResumptionMeter::Look(const SourceSync& sync, uint64_t hash_bytes) {
  if (!counting_) return;
  const SyncProgress progress = sync.progress();
  if (!stale_known_ && !sync.unproven()) {
    status_.stale_pages = progress.residual;
    stale_known_ = true;
  }
  status_.wire_bytes = progress.wire_bytes - wire_before_;
  status_.hash_bytes = hash_bytes - hash_before_;
  status_.all_bytes = all_before_ + status_.wire_bytes + status_.hash_bytes;
  if (!stale_known_ || !progress.first_pass_done || progress.residual > progress.set_point) return;
  status_.caught_up = true;
  counting_ = false;
}

}  // namespace presync
