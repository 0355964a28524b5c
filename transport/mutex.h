// A mutex and a condition variable that both clang's -Wthread-safety and ThreadSanitizer
// understand.
//
// Not absl::Mutex: Debian's abseil is built without ThreadSanitizer, which then sees none of its
// locking and reports every guarded access as a race. std::mutex is intercepted.
#pragma once

#include <condition_variable>
#include <mutex>
#include <utility>

#include "absl/base/thread_annotations.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"

namespace presync {

class ABSL_LOCKABLE Mutex {
 public:
  Mutex() = default;
  Mutex(const Mutex&) = delete;
  Mutex& operator=(const Mutex&) = delete;

  void Lock() ABSL_EXCLUSIVE_LOCK_FUNCTION() { mutex_.lock(); }
  void Unlock() ABSL_UNLOCK_FUNCTION() {
    Tell();
    mutex_.unlock();
  }

  // Waits until `done` holds, or `deadline`; whether it holds. `done` is called with the mutex
  // held, at once and after each time that another thread gave it up: nobody has to signal
  // anything.
  template <typename Done>
  bool AwaitWithDeadline(Done done, absl::Time deadline)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(this) ABSL_NO_THREAD_SAFETY_ANALYSIS {
    Tell();  // of what the caller changed before
    std::unique_lock<std::mutex> lock(mutex_, std::adopt_lock);
    ++waiters_;
    bool holds = done();
    for (bool late = false; !holds && !late; holds = done()) {
      if (deadline == absl::InfiniteFuture()) {
        changed_.wait(lock);
      } else {
        late = changed_.wait_until(lock, absl::ToChronoTime(deadline)) == std::cv_status::timeout;
      }
    }
    --waiters_;
    lock.release();  // the caller goes on holding it
    return holds;
  }
  template <typename Done>
  bool AwaitWithTimeout(Done done, absl::Duration timeout) ABSL_EXCLUSIVE_LOCKS_REQUIRED(this) {
    return AwaitWithDeadline(std::move(done), absl::Now() + timeout);
  }
  template <typename Done>
  void Await(Done done) ABSL_EXCLUSIVE_LOCKS_REQUIRED(this) {
    AwaitWithDeadline(std::move(done), absl::InfiniteFuture());
  }

  // For code that the analysis can't follow into, as a lambda: it takes it as held from here on.
  void AssertHeld() const ABSL_ASSERT_EXCLUSIVE_LOCK() {}

 private:
  friend class CondVar;

  // Before it is given up, for the one that is told may destroy it. Held.
  void Tell() {
    if (waiters_ > 0) changed_.notify_all();
  }

  std::mutex mutex_;
  std::condition_variable changed_;
  int waiters_ = 0;  // in Await
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
    mutex->Tell();
    std::unique_lock<std::mutex> lock(mutex->mutex_, std::adopt_lock);
    condition_.wait(lock);
    lock.release();  // the caller goes on holding it
  }
  // True: `deadline` has passed.
  bool WaitWithDeadline(Mutex* mutex, absl::Time deadline) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex) {
    if (deadline == absl::InfiniteFuture()) {
      Wait(mutex);
      return false;
    }
    mutex->Tell();
    std::unique_lock<std::mutex> lock(mutex->mutex_, std::adopt_lock);
    const auto result = condition_.wait_until(lock, absl::ToChronoTime(deadline));
    lock.release();
    return result == std::cv_status::timeout;
  }
  void Signal() { condition_.notify_one(); }
  void SignalAll() { condition_.notify_all(); }

 private:
  std::condition_variable condition_;
};

}  // namespace presync
