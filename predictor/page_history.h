// What the predictor remembers of one page, in 32 bits.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>

#include "predictor/page.h"

namespace presync {

// Fixed point 4.4: 16 * log2(x), linear between powers of two, for 1 <= x < 2^16. Exact integers,
// so that a replay is bit-identical; off by at most 1.4 sixteenths from the logarithm.
constexpr uint32_t Log2Sixteenths(uint32_t x) {
  const uint32_t exponent = std::bit_width(x) - 1;
  return exponent * 16 + (((x << 4) >> exponent) & 15);
}

// One word a page:
//   bits  0-13  stamp: the scan of the last write, modulo 2^14 (for a page never written: of its
//   last sending) bits 14-21  EWMA of log2 of the gaps between writes, 4.4 fixed point, a quarter
//   of each new gap bits 22-24  streak: scans in a row in which the page was seen written, without
//   the first bit  25     written at least once bit  26     waiting: written, left unarmed until
//   2^streak - 1 scans after the stamp (docs/prediction.md) bits 27-31  free
// `now` is the number of scans so far. A value, one word, no thread rule of its own.
class PageHistory {
 public:
  static constexpr uint32_t kStampBits = 14;
  // Ages saturate here; Saturate must see a page every 2^14 - kMaxAge scans or more often.
  static constexpr uint32_t kMaxAge = 1 << 13;
  static constexpr uint32_t kMaxStreak = 5;
  // A first gap is only the time the page was watched, which says little about the next one: it
  // counts as at most 2^7 scans. 7 is what first-time writers got in the simulations that chose the
  // policy.
  static constexpr uint32_t kMaxFirstGapLog2Sixteenths = 7 * 16;

  bool written() const { return (word_ >> 25) & 1; }
  bool waiting() const { return (word_ >> 26) & 1; }
  uint32_t streak() const { return (word_ >> 22) & 7; }
  uint32_t gap_log2_sixteenths() const { return (word_ >> 14) & 255; }

  // Scans since the last write; 0 for a waiting page, which counts as written in each scan.
  uint32_t Age(uint32_t now) const { return waiting() ? 0 : std::min(SinceStamp(now), kMaxAge); }

  // The page was seen written in scan `now`. A waiting page can't be seen, unless its owner armed
  // it nevertheless; then its last gap is 1.
  void OnWritten(uint32_t now, PageCount /*run_pages*/ = 1) {
    const uint32_t gap = std::max(Age(now), 1u);
    const uint32_t log2_gap = Log2Sixteenths(gap);
    if (written()) {
      Learn(log2_gap);
      SetField(22, 7, gap == 1 ? std::min(streak() + 1, kMaxStreak) : 0);
    } else {
      SetField(14, 255, std::min(log2_gap, kMaxFirstGapLog2Sixteenths));
    }
    word_ = (word_ | 1u << 25) & ~(1u << 26);
    Stamp(now);
  }

  // Begins the wait; the page must just have been written.
  void Wait() { word_ |= 1u << 26; }

  // Is `now` the scan in which the wait ends, for a streak counted up to `max_streak`?
  bool WaitEnds(uint32_t now, uint32_t max_streak) const {
    return waiting() && SinceStamp(now) == WaitScans(max_streak);
  }

  // Scans that the page stays unarmed after it was seen written.
  uint32_t WaitScans(uint32_t max_streak, uint32_t /*spare*/ = 0) const {
    return (1u << std::min(streak(), max_streak)) - 1;
  }

  // Ends the wait: every scan of it counts as a write, one scan after the one before.
  void EndWait(uint32_t now) {
    for (uint32_t scans = SinceStamp(now); scans > 0; --scans) Learn(0);
    word_ &= ~(1u << 26);
    Stamp(now);
  }

  // The page is armed and sent, so it is watched from now on.
  void OnSent(uint32_t now) {
    if (waiting()) {
      EndWait(now);
    } else if (!written()) {
      Stamp(now);
    }
  }

  // Keeps an old stamp from wrapping round to a young one.
  void Saturate(uint32_t now) {
    if (SinceStamp(now) > kMaxAge) Stamp(now - kMaxAge);
  }

 private:
  static constexpr uint32_t kStampMask = (1 << kStampBits) - 1;

  uint32_t SinceStamp(uint32_t now) const { return (now - word_) & kStampMask; }
  void Stamp(uint32_t now) { SetField(0, kStampMask, now & kStampMask); }
  void SetField(uint32_t shift, uint32_t mask, uint32_t value) {
    word_ = (word_ & ~(mask << shift)) | (value << shift);
  }

  // Moves the EWMA by a quarter of the difference, rounded away from zero: it gets all the way
  // there.
  void Learn(uint32_t log2_gap) {
    const int old = static_cast<int>(gap_log2_sixteenths());
    const int difference = static_cast<int>(log2_gap) - old;
    const int step = difference >= 0 ? (difference + 3) / 4 : (difference - 3) / 4;
    SetField(14, 255, static_cast<uint32_t>(old + step));
  }

  uint32_t word_ = 0;
};
static_assert(sizeof(PageHistory) == 4);

}  // namespace presync
