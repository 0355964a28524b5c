// The policy: which stale page to send next, and which pages are worth watching.
//
// The stale set is a write-back cache whose size is the set-point: while it is not full nothing needs to be
// sent, and a page written again in it costs nothing. When it overflows, the page to send is the one
// whose next write is farthest away (Belady's rule); a policy is a guess at that.
#pragma once

#include <memory>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "predictor/bitmap.h"
#include "predictor/page.h"

namespace presync {

// Virtual calls carry batches. Deterministic: the same calls give the same answers, bit for bit; no
// clock, no randomness, no floating point whose result could differ. Not thread-safe.
//
// The caller's rhythm, once a scan interval:
//   OnScan(pages seen written) -> AppendPagesToArm -> Choose (perhaps several times) -> OnSent.
class SendPolicy {
 public:
  virtual ~SendPolicy() = default;

  virtual std::string_view name() const = 0;

  // A scan ended. `written`: the pages that were armed and have been written since (ascending runs).
  // Advances the policy's time by one scan even if `written` is empty.
  virtual void OnScan(absl::Span<const PageRun> written) = 0;

  // Appends the pages to arm again after this scan (ascending runs): those in `written` that are worth
  // watching, and those whose arming back-off ended. A page that isn't armed counts as written in each scan.
  virtual void AppendPagesToArm(std::vector<PageRun>* out) = 0;

  // Picks `pages` pages (fewer if there are fewer) out of `candidates`, best first by the policy's
  // guess; hands them back as ascending maximal runs, replacing `*chosen`.
  virtual void Choose(const PageBitmap& candidates, PageCount pages,
                      std::vector<PageRun>* chosen) = 0;

  // These pages were armed and posted just now.
  virtual void OnSent(absl::Span<const PageRun> runs) = 0;
};

// Makes the policy called `name` ("ewma", "oldest", "every-scan") for a guest of `pages` pages.
// INVALID_ARGUMENT: no such policy; the text lists those there are.
absl::StatusOr<std::unique_ptr<SendPolicy>> MakePolicy(std::string_view name, PageCount pages);

// The names that MakePolicy knows, the default first.
std::vector<std::string_view> PolicyNames();

}  // namespace presync
