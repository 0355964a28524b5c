// A recording of a guest's writes beside its sync: the session's thread makes it, another thread
// fetches it in parts.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "predictor/page.h"
#include "transport/mutex.h"
#include "transport/sync/write_recorder.h"

namespace presync {

// Some scans, in order. A scan may be cut: its runs go on in the next part.
struct RecordedPart {
  std::vector<PageRun> runs;
  std::vector<size_t> ends;  // each scan's end in `runs`; what is behind the last is a beginning
  uint64_t missed = 0;       // since the start: scans that came too late and are empty
  bool ended = false;        // nothing follows
  std::string problem;       // why it ended, if nobody stopped it
};

// At most one recording at a time. Thread-safe, but for Step.
class SessionRecording {
 public:
  static constexpr absl::Duration kShortest = absl::Milliseconds(10);  // the session's step is 5
  static constexpr absl::Duration kLongest = absl::Seconds(60);

  // Asks for a recording with a scan each `interval`. ALREADY_EXISTS: one is under way.
  // OUT_OF_RANGE: the interval.
  absl::Status Start(absl::Duration interval) ABSL_LOCKS_EXCLUDED(mutex_);
  // What was recorded since the last call, at most `max_runs` runs. NOT_FOUND: nobody records.
  absl::StatusOr<RecordedPart> Take(size_t max_runs) ABSL_LOCKS_EXCLUDED(mutex_);
  // NOT_FOUND: nobody records.
  absl::Status Stop() ABSL_LOCKS_EXCLUDED(mutex_);

  // The session's thread: scans if a scan is due. Call it often. The dirty log's errors, which end
  // the recording.
  absl::Status Step(WriteRecorder* recorder, absl::Time now) ABSL_LOCKS_EXCLUDED(mutex_);
  // The session's thread: the session is over, and with it a recording.
  void End(const std::string& why) ABSL_LOCKS_EXCLUDED(mutex_);

 private:
  enum class State { kNone, kAsked, kRunning, kEnded };

  absl::Status Begin(WriteRecorder* recorder, absl::Time now) ABSL_LOCKS_EXCLUDED(mutex_);
  absl::Status Scan(WriteRecorder* recorder, absl::Time now) ABSL_LOCKS_EXCLUDED(mutex_);
  void Finish(const std::string& problem) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);

  mutable Mutex mutex_;
  State state_ ABSL_GUARDED_BY(mutex_) = State::kNone;
  absl::Duration interval_ ABSL_GUARDED_BY(mutex_);
  absl::Time last_taken_ ABSL_GUARDED_BY(mutex_);
  RecordedPart kept_ ABSL_GUARDED_BY(mutex_);

  // The session thread's own.
  absl::Time next_scan_ = absl::InfiniteFuture();
  std::vector<PageRun> written_;
};

}  // namespace presync
