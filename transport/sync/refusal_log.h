// Says each kind of refusal once, and later how often it came again: whoever knocks ten thousand
// times must not fill the log.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <string>
#include <utility>

#include "absl/base/thread_annotations.h"
#include "absl/time/time.h"
#include "transport/mutex.h"

namespace presync {

// Thread-safe.
class RefusalLog {
 public:
  using Sink = std::function<void(const std::string& line)>;
  // Of different refusals so many are told apart; more are counted together.
  static constexpr size_t kMaxKinds = 256;

  // `sink` may be called from any thread, never under a lock of the log's.
  explicit RefusalLog(Sink sink, absl::Duration quiet = absl::Minutes(1))
      : sink_(std::move(sink)), quiet_(quiet) {}

  // `who` was refused because of `why`: said now, unless the same was said within the quiet time.
  void Refuse(const std::string& who, const std::string& why, absl::Time now)
      ABSL_LOCKS_EXCLUDED(mutex_);

  // Says how often those came again whose quiet time is over, and forgets them. Call it now and
  // then.
  void Flush(absl::Time now) ABSL_LOCKS_EXCLUDED(mutex_);

 private:
  struct Kind {
    absl::Time said;
    uint64_t again = 0;
  };
  const Sink sink_;
  const absl::Duration quiet_;
  Mutex mutex_;
  std::map<std::pair<std::string, std::string>, Kind> kinds_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace presync
