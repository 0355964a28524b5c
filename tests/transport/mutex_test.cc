#include "transport/mutex.h"

#include <gtest/gtest.h>

#include <atomic>
#include <thread>
#include <vector>

#include "absl/time/time.h"

namespace presync {
namespace {

// Each looks at its predicate when it begins, when somebody has let go of the mutex, and when its
// time is over. That somebody else looks is no reason.
TEST(Mutex, ThoseWhoAwaitDoNotWakeEachOther) {
  Mutex mutex;
  std::atomic<int> looks = 0;
  std::vector<std::thread> threads;
  for (int i = 0; i < 3; ++i) {
    threads.emplace_back([&] {
      MutexLock lock(&mutex);
      const auto never = [&looks] {
        ++looks;
        return false;
      };
      EXPECT_FALSE(mutex.AwaitWithTimeout(never, absl::Milliseconds(300)));
    });
  }
  for (std::thread& thread : threads) thread.join();
  // At the begin and the end of each, and for each of the others that begins or ends.
  EXPECT_LE(looks, 3 * 6);
}

TEST(Mutex, WhatIsChangedBeforeAWaitIsSeenByThoseWhoAwait) {
  Mutex mutex;
  bool first = false, second = false;
  std::thread other([&] {
    MutexLock lock(&mutex);
    const auto changed = [&first] { return first; };
    mutex.Await(changed);
    second = true;
  });
  {
    MutexLock lock(&mutex);
    first = true;
    const auto answered = [&second] { return second; };
    mutex.Await(answered);
  }
  other.join();
}

}  // namespace
}  // namespace presync
