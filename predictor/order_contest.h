// Which of several orders of sending serves this guest best just now: each plays against the
// guest's writes with a small cache of its own. docs/prediction.md, "The contest".
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "predictor/page.h"

namespace presync {

// Each rival keeps a shadow of the stale set: a sample of the pages, by hash, held to the size of
// the real set scaled by the same factor. A written page that a rival's shadow had let go costs
// that rival one sending; the rival with the fewest of late leads. (Adaptive caches do this with
// ghost lists: Vietri et al., "Driving Cache Replacement with ML-based LeCaR", HotStorage 2018.)
//
// Integers only; constant memory, about 100 KB. Not thread-safe.
class OrderContest {
 public:
  static constexpr size_t kRivals = 5;
  // The last rival goes by age to the scan, the others by what they make of a page. The highest is
  // let go first.
  static constexpr size_t kByAge = kRivals - 1;
  using Scores = std::array<uint16_t, kRivals>;

  OrderContest() : slots_(kSlots) {}

  // The stale set holds up to `pages` pages: the shadows follow its size. With 0 there is nothing
  // to choose, and the contest rests.
  void SetSize(PageCount pages);

  // Whether `page` is in the shadow of at least one rival, so that OnAged wants to hear of it.
  bool Holds(PageIndex page) const {
    return Sampled(page) && SlotOf(page).held != 0 && SlotOf(page).page == page;
  }

  // `page` counts as written in this scan, and in each to come while it `waits`.
  void OnWritten(PageIndex page, const Scores& scores, bool waits);
  // A page that waited is watched from now on. Precondition: Holds(page).
  void OnWatched(PageIndex page) { SlotOf(page).written = scans_; }
  // `page` is scored anew for its age. Does nothing for a page that no rival holds.
  void OnAged(PageIndex page, const Scores& scores);

  // Ends a scan: the shadows shrink to their size. True if there is a new leader.
  bool EndScan();

  size_t leader() const { return leader_; }

 private:
  static constexpr size_t kSlots = 4096;
  static constexpr uint32_t kWaits = UINT32_MAX;
  static constexpr uint8_t kByAll = (1 << kRivals) - 1;

  struct Slot {
    PageIndex page;
    uint8_t held;      // bit r: by rival r
    uint32_t written;  // the scan, or kWaits
    Scores scores;
  };

  static uint32_t Hash(PageIndex page) {
    const uint32_t hash = (page ^ page >> 15) * 0x9e3779b1;
    return (hash ^ hash >> 14) * 0x85ebca77;
  }
  bool Sampled(PageIndex page) const {
    return size_ > 0 && (Hash(page) >> 16 & (one_in_ - 1)) == 0;
  }
  const Slot& SlotOf(PageIndex page) const { return slots_[Hash(page) % kSlots]; }
  Slot& SlotOf(PageIndex page) { return slots_[Hash(page) % kSlots]; }

  uint32_t OrderOf(size_t rival, const Slot& slot) const;
  void Shrink(size_t rival);
  bool ChangeLeader();

  uint32_t one_in_ = 1;  // a power of two, at most 2^16
  PageCount size_ = 0;   // of each shadow
  std::vector<Slot> slots_;
  std::vector<uint16_t> live_;  // the slots that some rival holds
  std::array<PageCount, kRivals> holding_{};
  std::array<uint32_t, kRivals> resends_{};  // of late
  bool changed_ = false;                     // a shadow grew in this scan
  uint32_t scans_ = 0;
  size_t leader_ = 1;
  std::vector<uint32_t> order_;  // scratch
};

}  // namespace presync
