#include "predictor/order_contest.h"

#include <algorithm>
#include <bit>
#include <functional>
#include <numeric>

namespace presync {
namespace {

// A shadow has from 3/4 of this to 3 times as many pages, once the stale set has that many. Larger
// ones chose no better on the traces, and cost more.
constexpr PageCount kShadowPages = 128;
constexpr uint32_t kScansBetweenChanges = 4;
// When the rivals have had so many resends together, all are halved: the contest forgets.
constexpr uint32_t kForgetAt = 2000;
// A new leader has to be better by this, and by one in kMarginPart: changing scores everything
// anew.
constexpr uint32_t kMargin = 10;
constexpr uint32_t kMarginPart = 10;
// By age alone has to be better by one in so many: leading, it costs more than its shadow says.
constexpr uint32_t kByAgePart = 4;

}  // namespace

void OrderContest::SetSize(PageCount pages) {
  size_ = pages / one_in_;
  if (size_ >= kShadowPages * 3 / 4 && size_ < kShadowPages * 3) return;
  const uint32_t one_in = std::bit_floor(std::clamp(pages / kShadowPages, 1u, 1u << 16));
  if (one_in == one_in_) return;
  one_in_ = one_in;
  size_ = pages / one_in_;
  for (uint16_t slot : live_) slots_[slot].held = 0;
  live_.clear();
  holding_ = {};
}

void OrderContest::OnWritten(PageIndex page, const Scores& scores, bool waits) {
  if (!Sampled(page)) return;
  Slot& slot = SlotOf(page);
  // A page that finds its slot taken stays out of the contest: the same for all rivals.
  if (slot.held != 0 && slot.page != page) return;
  if (slot.held == 0) live_.push_back(static_cast<uint16_t>(&slot - slots_.data()));
  for (size_t rival = 0; rival < kRivals; ++rival) {
    if (slot.held >> rival & 1) continue;
    ++holding_[rival];
    if (slot.held != 0) ++resends_[rival];  // if none held it, it cost all of them the same
  }
  slot = {page, kByAll, waits ? kWaits : scans_, scores};
  changed_ = true;
}

void OrderContest::OnAged(PageIndex page, const Scores& scores) {
  if (Holds(page)) SlotOf(page).scores = scores;
}

bool OrderContest::EndScan() {
  if (size_ == 0) return false;
  if (changed_) {
    for (size_t rival = 0; rival < kRivals; ++rival) Shrink(rival);
    std::erase_if(live_, [&](uint16_t slot) { return slots_[slot].held == 0; });
    changed_ = false;
  }
  return ++scans_ % kScansBetweenChanges == 0 && ChangeLeader();
}

uint32_t OrderContest::OrderOf(size_t rival, const Slot& slot) const {
  if (rival != kByAge) return slot.scores[rival];
  return slot.written == kWaits ? 0 : std::min(scans_ - slot.written, 0xffffu);
}

void OrderContest::Shrink(size_t rival) {
  if (holding_[rival] <= size_) return;
  order_.clear();
  for (uint16_t slot : live_) {
    if (slots_[slot].held >> rival & 1) {
      order_.push_back(OrderOf(rival, slots_[slot]) << 16 | slot);
    }
  }
  const size_t out = holding_[rival] - size_;
  std::nth_element(order_.begin(), order_.begin() + out - 1, order_.end(), std::greater<>());
  for (size_t i = 0; i < out; ++i) {
    slots_[order_[i] & 0xffff].held &= static_cast<uint8_t>(~(1u << rival));
  }
  holding_[rival] = size_;
}

bool OrderContest::ChangeLeader() {
  std::array<uint32_t, kRivals> costs = resends_;
  costs[kByAge] += costs[kByAge] / kByAgePart;
  const size_t best = std::min_element(costs.begin(), costs.end()) - costs.begin();
  const uint32_t fewest = costs[best];
  const uint32_t needs = fewest + kMargin + fewest / kMarginPart;
  const bool change = best != leader_ && needs < costs[leader_];
  if (change) leader_ = best;
  if (std::accumulate(resends_.begin(), resends_.end(), 0u) > kForgetAt) {
    for (uint32_t& resends : resends_) resends -= resends / 2;
  }
  return change;
}

}  // namespace presync
