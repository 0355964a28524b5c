// Pages whose bytes a device may still be changing without anybody seeing it.
//
// A disk read into guest memory that goes past the page cache (O_DIRECT, and whatever the host's
// file system treats alike) pins its pages when it is submitted: that is the one write that a dirty
// log reports. The data lands later, through the kernel's own mapping. So a page that was armed and
// read for sending between the two has a copy on the target that is old, and nothing says so.
//
// A page is therefore *unsettled* from the moment it is read until it was compared with its copy at
// a time when every request that was in flight at that moment has ended. docs/design.md, "Reads
// under way", has the argument.
#pragma once

#include <array>
#include <cstdint>
#include <vector>

#include "absl/time/time.h"
#include "absl/types/span.h"
#include "predictor/bitmap.h"
#include "predictor/page.h"
#include "transport/guest.h"

namespace presync {

// Bookkeeping only: no I/O, no clock of its own. Not thread-safe. Four bits a page.
//
// A page is *young* when it was just read. At a look (RequestLook) the young ones begin to *ripen*
// together; when no request is likely to be as old as they are, they are *ripe*: to be compared.
// Those that were equal are *presumed* settled, on the condition that no request has lasted longer
// than they were left alone. Each later look checks that condition for the requests that ended
// before it, and the last one, when the guest stands still and has drained its devices, checks it
// for all that are left. Where it does not hold, these pages are young again.
class UnsettledPages {
 public:
  // `patience`: the least time that a request is given to end. It decides only how much has to be
  // compared when the guest stands still, never whether.
  UnsettledPages(PageCount pages, absl::Duration patience);

  // The page was armed, and its bytes are about to be read for the target's copy.
  void OnRead(PageRun run);
  // Nothing has to be found out about these: they are stale, and will be read again; or they were
  // read while nothing could be in flight into them.
  void Forget(PageRun run);

  // What the guest's devices say by now. `now`: when the look was over.
  void OnLook(const RequestLook& look, absl::Time now);

  // Pages that may be compared now. A comparison that began with one value of `doubts` and ended
  // with another proves nothing.
  const PageBitmap& ripe() const { return ripe_; }
  uint64_t doubts() const { return doubts_; }
  // These were ripe when they were compared, and are equal to their copies.
  void OnEqual(absl::Span<const PageRun> runs);

  // The guest stands still, all its requests have ended, and then it was looked at for the last
  // time: what has to be compared. Until the next OnLook.
  const PageBitmap& AtStandstill(const RequestLook& last);

  // The parts of `run` that are not presumed settled, and those that are: these have no business to
  // differ from their copies, if no request that is in flight now is as old as they are. Two looks
  // later it is known of those that had ended.
  void AppendUnsettledWithin(PageRun run, std::vector<PageRun>* out) const;
  void AppendPresumedWithin(PageRun run, std::vector<PageRun>* out) const {
    presumed_.AppendRunsWithin(run, out);
  }
  uint64_t looks() const { return looks_; }
  // What a launch would compare if its last look were as the earlier ones were.
  PageBitmap All() const;
  PageCount count() const { return young_.count() + ripening_.count() + ripe_.count(); }
  // Whether looks are of any use.
  bool wants_looks() const { return count() > 0 || !presumed_.empty(); }

 private:
  // How many looks decide how long a request may take.
  static constexpr size_t kLooks = 64;

  void Doubt();
  absl::Duration Patience() const;

  const absl::Duration patience_;
  PageBitmap young_, ripening_, ripe_, presumed_;  // disjoint
  absl::Time ripening_since_ = absl::InfinitePast();
  // The shortest time that any page of ripe_, or of presumed_, was left alone.
  absl::Duration ripe_after_ = absl::InfiniteDuration();
  absl::Duration presumed_after_ = absl::InfiniteDuration();
  std::array<absl::Duration, kLooks> longest_;  // of the newest looks
  uint64_t looks_ = 0;
  uint64_t doubts_ = 0;
};

}  // namespace presync
