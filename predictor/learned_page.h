// What the learned policy remembers of one page, in 32 bits.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>

#include "predictor/page.h"
#include "predictor/page_history.h"

namespace presync {

// One word a page:
//   bits  0-13  stamp: the scan of the last write, modulo 2^14
//   bits 14-19  EWMA of log2 of the gaps between writes, in quarters, a quarter of each new gap
//   bits 20-24  the last gap: 1 to 5 for a gap of 1 with that streak, 6 and 7 for gaps of 2 and 3,
//               then two buckets to the octave; kUnseen as long as there was no gap
//   bits 25-26  writes seen, at most 3; 0 = never written
//   bits 27-28  log4 of the length of the run in which it was last written, at most 3
//   bit  29     stale, as far as this word was told: written since it was last sent
//   bit  30     waiting: in arming back-off, as in PageHistory
//   bit  31     free
// The arming back-off follows the rules of PageHistory (docs/prediction.md, "Arming back-off"). A
// value, no thread rule of its own.
class LearnedPage {
 public:
  static constexpr uint32_t kStampBits = 14;
  static constexpr uint32_t kMaxAge = 1 << 13;
  static constexpr uint32_t kMaxStreak = 5;
  static constexpr uint32_t kMaxSpare = 31;
  static constexpr uint32_t kUnseen = 31;
  // What the EWMA stands at before there was a gap: 2^7 scans.
  static constexpr uint32_t kFirstGapLog2Quarters = 7 * 4;

  bool written() const { return writes() > 0; }
  bool waiting() const { return (word_ >> 30) & 1; }
  bool stale() const { return (word_ >> 29) & 1; }
  uint32_t stamp() const { return word_ & kStampMask; }
  uint32_t gap_log2_quarters() const { return (word_ >> 14) & 63; }
  uint32_t last_gap() const { return (word_ >> 20) & 31; }
  uint32_t writes() const { return (word_ >> 25) & 3; }
  uint32_t run_log4() const { return (word_ >> 27) & 3; }
  uint32_t streak() const { return last_gap() <= kMaxStreak ? last_gap() : 0; }

  uint32_t Age(uint32_t now) const { return waiting() ? 0 : std::min(SinceStamp(now), kMaxAge); }

  void OnWritten(uint32_t now, PageCount run_pages) {
    const uint32_t gap = std::max(Age(now), 1u);
    if (!written()) {
      SetField(14, 63, kFirstGapLog2Quarters);
      SetField(20, 31, kUnseen);
    } else {
      const uint32_t quarters = Log2Sixteenths(gap) / 4;
      if (writes() == 1) {
        SetField(14, 63, quarters);
      } else {
        Learn(quarters);
      }
      SetField(20, 31, gap == 1 ? std::min(streak() + 1, kMaxStreak) : GapBucket(gap));
    }
    SetField(25, 3, std::min(writes() + 1, 3u));
    SetField(27, 3, std::min<uint32_t>((std::bit_width(run_pages) - 1) / 2, 3));
    word_ = (word_ | 1u << 29) & ~(1u << 30);
    Stamp(now);
  }

  void Wait() { word_ |= 1u << 30; }

  // Whether a wait that was filed for scan `now` ends: an entry of an earlier wait may end this one
  // too soon, which costs a fault.
  bool WaitEnds(uint32_t /*now*/, uint32_t /*max_streak*/) const { return waiting(); }

  // Scans to wait after a write: 2^streak - 1, but `spare` if two writes are expected within that.
  uint32_t WaitScans(uint32_t max_streak, uint32_t spare = 0) const {
    const uint32_t wait = (1u << std::min(streak(), max_streak)) - 1;
    if (spare <= wait || gap_log2_quarters() + 4 > Log2Sixteenths(spare) / 4) return wait;
    return max_streak == 0 ? 0 : std::min(spare, kMaxSpare);
  }

  void EndWait(uint32_t now) {
    const uint32_t known = (1u << streak()) - 1;  // scans that it was expected to be written in
    for (uint32_t scans = std::min(SinceStamp(now), known); scans > 0 && gap_log2_quarters() > 0;
         --scans)
      Learn(0);
    word_ &= ~(1u << 30);
    Stamp(now);
  }

  void OnSent(uint32_t now) {
    if (waiting()) EndWait(now);
    word_ &= ~(1u << 29);
  }

  void Saturate(uint32_t now) {
    if (SinceStamp(now) > kMaxAge) Stamp(now - kMaxAge);
  }

 private:
  static constexpr uint32_t kStampMask = (1 << kStampBits) - 1;

  // Gaps from 2 on: 6 and 7 for 2 and 3, then two buckets to the octave up to 2^12.
  static constexpr uint32_t GapBucket(uint32_t gap) {
    if (gap < 4) return gap + 4;
    const uint32_t exponent = std::bit_width(gap) - 1;
    return std::min(8 + 2 * (exponent - 2) + ((gap >> (exponent - 1)) & 1), kUnseen - 1);
  }

  uint32_t SinceStamp(uint32_t now) const { return (now - word_) & kStampMask; }
  void Stamp(uint32_t now) { SetField(0, kStampMask, now & kStampMask); }
  void SetField(uint32_t shift, uint32_t mask, uint32_t value) {
    word_ = (word_ & ~(mask << shift)) | (value << shift);
  }

  // Moves the EWMA by a quarter of the difference, rounded away from zero: it gets all the way
  // there.
  void Learn(uint32_t quarters) {
    const int old = static_cast<int>(gap_log2_quarters());
    const int difference = static_cast<int>(quarters) - old;
    const int step = difference >= 0 ? (difference + 3) / 4 : (difference - 3) / 4;
    SetField(14, 63, static_cast<uint32_t>(old + step));
  }

  uint32_t word_ = 0;
};
static_assert(sizeof(LearnedPage) == 4);

}  // namespace presync
