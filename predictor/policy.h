// The policy: which stale page to send next, and which pages are worth watching.
//
// The stale set is a write-back cache whose size is the set-point: while it is not full nothing
// needs to be sent, and a page written again in it costs nothing. When it overflows, the page to
// send is the one whose next write is farthest away (Belady's rule); a policy is a guess at that.
#pragma once

#include <cstdint>
#include <memory>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "predictor/bitmap.h"
#include "predictor/page.h"

namespace presync {

// Virtual calls carry batches. Deterministic: the same calls give the same answers, bit for bit; no
// clock, no randomness, no floating point whose result could differ. Not thread-safe. It knows no
// regions: its runs may cross from one into the next, and the caller splits them.
//
// The caller's rhythm, once a scan interval:
//   OnScan(pages seen written) -> AppendPagesToArm -> Choose (perhaps several times) -> OnSent.
class SendPolicy {
 public:
  virtual ~SendPolicy() = default;

  virtual std::string_view name() const = 0;

  // A scan ended. `written`: the pages that were armed and have been written since (ascending
  // runs). Advances the policy's time by one scan even if `written` is empty.
  virtual void OnScan(absl::Span<const PageRun> written) = 0;

  // Appends the pages to arm again after this scan (ascending maximal runs): those in `written`
  // that are worth watching, and those whose arming back-off ended. All of them are stale. A page
  // that was written and isn't armed counts as written in each scan; one that was never seen
  // written is the best to send.
  virtual void AppendPagesToArm(std::vector<PageRun>* out) = 0;

  // How many stale pages to leave when `set_point` would be within the promise: sending ends there.
  // The set-point itself, but for baselines that send all or at set times. UINT32_MAX: send nothing
  // now. A session never leaves more than the set-point whatever this says. Asked once a scan or
  // more often, before Choose.
  virtual PageCount Goal(PageCount set_point) { return set_point; }

  // Picks `pages` pages (fewer if there are fewer) out of `candidates`, best first by the policy's
  // guess; hands them back as ascending maximal runs, replacing `*chosen`. `candidates` has one bit
  // for each page of the guest.
  virtual void Choose(const PageBitmap& candidates, PageCount pages,
                      std::vector<PageRun>* chosen) = 0;

  // These pages were armed and posted just now.
  virtual void OnSent(absl::Span<const PageRun> runs) = 0;
};

struct PolicyOptions {
  // A page that is seen written scan after scan stays unarmed for up to 2^this scans; 0 turns the
  // arming back-off off, 5 is the most.
  uint32_t max_back_off_log2 = 5;
  // For "once-a-second".
  uint32_t scans_per_second = 10;
};

// Makes the policy called `name` for a guest of `pages` pages:
//   "learned"        what this guest's own past says about when a page is written again
//   "ewma"           longest predicted gap first: the larger of the EWMA of its gaps and its age
//   "oldest"         oldest last write first
//   "skip-if-dirty"  in address order, but pages that the last look found dirty again come last
//   "once-a-second"  every stale page, once a second
//   "every-scan"     every stale page, in every scan
// INVALID_ARGUMENT: no such policy, the text lists those there are; or an option out of range.
absl::StatusOr<std::unique_ptr<SendPolicy>> MakePolicy(std::string_view name, PageCount pages,
                                                       const PolicyOptions& options = {});

// The names that MakePolicy knows, the default first.
std::vector<std::string_view> PolicyNames();

}  // namespace presync
