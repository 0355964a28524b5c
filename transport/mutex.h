// A mutex and a condition variable that both clang's -Wthread-safety and ThreadSanitizer
// understand.
//
// Not absl::Mutex: Debian's abseil is built without ThreadSanitizer, which then sees none of its
// locking and reports every guarded access as a race. std::mutex is intercepted.
#pragma once

#include <condition_variable>
#include <mutex>

#include "absl/base/thread_annotations.h"
#include "absl/time/time.h"
#include "transport/clock.h"

namespace presync {

class ABSL_LOCKABLE Mutex {
 public:
  Mutex() = default;
  Mutex(const Mutex&) = delete;
  Mutex& operator=(const Mutex&) = delete;

  void Lock() ABSL_EXCLUSIVE_LOCK_FUNCTION() { mutex_.lock(); }
  void Unlock() ABSL_UNLOCK_FUNCTION() {
    WakeAwaiting();
    mutex_.unlock();
  }
  // For code that the analysis can't follow into, as a lambda: it takes it as held from here on.
  void AssertHeld() const ABSL_ASSERT_EXCLUSIVE_LOCK() {}

  // Wait until `is_true()`, which is called with this mutex held: at once, and again whenever
  // another thread has let go of it. Held at the return; the other two say whether it is true now.
  template <typename Predicate>
  void Await(const Predicate& is_true) ABSL_EXCLUSIVE_LOCKS_REQUIRED(this) {
    AwaitWithDeadline(is_true, absl::InfiniteFuture());
  }
  template <typename Predicate>
  bool AwaitWithTimeout(const Predicate& is_true, absl::Duration longest)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(this) {
    return AwaitWithDeadline(is_true, MonotonicNow() + longest);
  }
  template <typename Predicate>
  bool AwaitWithDeadline(const Predicate& is_true, absl::Time deadline)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(this) {
    if (is_true()) return true;
    // Once, for what the caller changed before. Who was woken and only looks changes nothing: two
    // of them would wake each other for ever.
    WakeAwaiting();
    for (bool in_time = true; in_time;) {
      ++awaiting_;
      in_time = Wait(&let_go_, deadline);
      --awaiting_;
      if (is_true()) return true;
    }
    return false;
  }

 private:
  friend class CondVar;

  // Whoever awaits looks again once the mutex is free. Called while it is held: after that the
  // mutex may be gone.
  void WakeAwaiting() {
    if (awaiting_ > 0) let_go_.notify_all();
  }
  // False: `deadline` has passed.
  bool Wait(std::condition_variable* condition, absl::Time deadline) {
    std::unique_lock<std::mutex> lock(mutex_, std::adopt_lock);
    bool in_time = true;
    if (deadline == absl::InfiniteFuture()) {
      condition->wait(lock);
    } else {
      in_time = condition->wait_until(lock, ToSteadyTime(deadline)) != std::cv_status::timeout;
    }
    lock.release();  // the caller goes on holding it
    return in_time;
  }

  std::mutex mutex_;
  std::condition_variable let_go_;
  int awaiting_ = 0;  // guarded by mutex_
};

class ABSL_SCOPED_LOCKABLE MutexLock {
 public:
  explicit MutexLock(Mutex* mutex) ABSL_EXCLUSIVE_LOCK_FUNCTION(mutex) : mutex_(mutex) {
    mutex_->Lock();
  }
  ~MutexLock() ABSL_UNLOCK_FUNCTION() { mutex_->Unlock(); }
  MutexLock(const MutexLock&) = delete;
  MutexLock& operator=(const MutexLock&) = delete;

 private:
  Mutex* const mutex_;
};

// Waits may end without a signal: call them in a loop on the condition.
class CondVar {
 public:
  void Wait(Mutex* mutex) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex) {
    WaitWithDeadline(mutex, absl::InfiniteFuture());
  }
  // True: `deadline` has passed.
  bool WaitWithDeadline(Mutex* mutex, absl::Time deadline) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex) {
    mutex->WakeAwaiting();
    return !mutex->Wait(&condition_, deadline);
  }
  void Signal() { condition_.notify_one(); }
  void SignalAll() { condition_.notify_all(); }

 private:
  std::condition_variable condition_;
};

}  // namespace presync
