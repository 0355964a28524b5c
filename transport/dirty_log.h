// The dirty log: which pages of a running guest were written since they were armed.
#pragma once

#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "absl/types/span.h"
#include "predictor/page.h"

namespace presync {

// One guest's log. At first no page is armed. One thread at a time may use it.
//
// Two verbs, kept apart on purpose: looking is cheap and touches nothing in the guest, arming costs
// the guest a fault at the page's next write. Whoever arms only what is worth watching keeps a hot
// page from faulting again and again.
class DirtyLog {
 public:
  virtual ~DirtyLog() = default;

  // "uffd-async", "uffd-handler", ...: for logs and status.
  virtual std::string_view name() const = 0;

  // Appends to `written` the armed pages that were written since they were armed, as ascending,
  // maximal runs within a region. A page is reported once: it is unarmed from then on, until it is
  // armed again. An unarmed page is never reported. UNAVAILABLE: the guest's process is gone, or
  // the log broke; every page must then be taken for stale.
  virtual absl::Status Peek(std::vector<PageRun>* written) = 0;

  // Arms `runs` (ascending; within one region each). When it returns, each later write to one of
  // these pages will be reported; writes before it are forgotten. So: arm first, then read the
  // bytes. INVALID_ARGUMENT: a run outside the guest's memory. UNAVAILABLE as above.
  virtual absl::Status Arm(absl::Span<const PageRun> runs) = 0;
};

}  // namespace presync
