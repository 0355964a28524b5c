#include "transport/sync/state_budget.h"

#include "absl/strings/str_cat.h"

namespace presync {

absl::Status StateBudget::Share::Take(uint64_t bytes) {
  MutexLock lock(&budget_->mutex_);
  const StateLimits& limits = budget_->limits_;
  const auto it = budget_->peers_.find(peer_);
  const uint64_t own = it == budget_->peers_.end() ? 0 : it->second;
  const auto beyond = [bytes](uint64_t held, uint64_t limit) {
    return bytes > limit || held > limit - bytes;
  };
  const bool of_all = beyond(budget_->all_, limits.all_bytes);
  if (of_all || beyond(own, limits.a_peer_bytes)) {
    return absl::ResourceExhaustedError(absl::StrCat(
        "the device state that waits here to be loaded, of ",
        of_all ? "all peers, is as much as may be: " : "this peer's guests, is as much as may be: ",
        (of_all ? limits.all_bytes : limits.a_peer_bytes) >> 20, " MiB; launch it again later"));
  }
  budget_->all_ += bytes;
  budget_->peers_[peer_] += bytes;
  bytes_ += bytes;
  return absl::OkStatus();
}

void StateBudget::Share::GiveBack() {
  if (bytes_ == 0) return;
  MutexLock lock(&budget_->mutex_);
  budget_->all_ -= bytes_;
  const auto it = budget_->peers_.find(peer_);
  it->second -= bytes_;
  if (it->second == 0) budget_->peers_.erase(it);
  bytes_ = 0;
}

}  // namespace presync
