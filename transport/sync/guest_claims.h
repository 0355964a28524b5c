// Who has a guest's name in hand for a moment: a session that begins, recovery that acts on a QEMU,
// a question that is answered. What was read of a guest's records under a claim is still so when it
// is acted upon.
#pragma once

#include <set>
#include <string>
#include <utility>

#include "absl/base/thread_annotations.h"
#include "absl/time/time.h"
#include "transport/mutex.h"

namespace presync {

// Thread-safe. Nobody waits for a claim while it holds one of another guest.
class GuestClaims {
 public:
  // Gives the name back when it goes. Movable; the claims outlive it.
  class Claim {
   public:
    Claim() = default;
    Claim(Claim&& other) noexcept
        : claims_(std::exchange(other.claims_, nullptr)), guest_(std::move(other.guest_)) {}
    Claim& operator=(Claim&& other) noexcept {
      std::swap(claims_, other.claims_);
      std::swap(guest_, other.guest_);
      return *this;
    }
    ~Claim() {
      if (claims_ == nullptr) return;
      MutexLock lock(&claims_->mutex_);
      claims_->names_.erase(guest_);
    }
    bool held() const { return claims_ != nullptr; }

   private:
    friend class GuestClaims;
    Claim(GuestClaims* claims, std::string guest) : claims_(claims), guest_(std::move(guest)) {}

    GuestClaims* claims_ = nullptr;
    std::string guest_;
  };

  // Waits for the name, `longest` at most; not held() then.
  Claim Take(const std::string& guest, absl::Duration longest) ABSL_LOCKS_EXCLUDED(mutex_) {
    MutexLock lock(&mutex_);
    const auto free = [&] {
      mutex_.AssertHeld();
      return !names_.contains(guest);
    };
    if (!mutex_.AwaitWithTimeout(free, longest)) return {};
    names_.insert(guest);
    return Claim(this, guest);
  }

 private:
  Mutex mutex_;
  std::set<std::string> names_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace presync
