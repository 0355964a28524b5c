#include "transport/sync/session_recording.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "transport/clock.h"

namespace presync {
namespace {

// Who records fetches every second or so. A recording that nobody fetches must not cost the guest
// its faults for ever.
constexpr absl::Duration kLongestSilence = absl::Seconds(30);
// 64 MiB: some minutes of a guest that writes 2,000 scattered runs in each scan of 100 ms.
constexpr size_t kMostRuns = 8 << 20;

}  // namespace

absl::Status SessionRecording::Start(absl::Duration interval) {
  if (interval < kShortest || interval > kLongest) {
    return absl::OutOfRangeError(absl::StrCat("a recording's interval is from ",
                                              absl::FormatDuration(kShortest), " to ",
                                              absl::FormatDuration(kLongest)));
  }
  MutexLock lock(&mutex_);
  if (state_ == State::kAsked || state_ == State::kRunning) {
    return absl::AlreadyExistsError("this guest is being recorded already");
  }
  state_ = State::kAsked;
  interval_ = interval;
  last_taken_ = MonotonicNow();
  kept_ = {};
  return absl::OkStatus();
}

absl::StatusOr<RecordedPart> SessionRecording::Take(size_t max_runs) {
  MutexLock lock(&mutex_);
  if (state_ == State::kNone) return absl::NotFoundError("this guest is not being recorded");
  last_taken_ = MonotonicNow();
  RecordedPart part;
  part.missed = kept_.missed;
  const size_t count = std::min(max_runs, kept_.runs.size());
  const auto cut = kept_.runs.begin() + static_cast<std::ptrdiff_t>(count);
  part.runs.assign(kept_.runs.begin(), cut);
  kept_.runs.erase(kept_.runs.begin(), cut);
  const auto whole = std::upper_bound(kept_.ends.begin(), kept_.ends.end(), count);
  part.ends.assign(kept_.ends.begin(), whole);
  kept_.ends.erase(kept_.ends.begin(), whole);
  for (size_t& end : kept_.ends) end -= count;
  if (state_ == State::kEnded && kept_.ends.empty()) {
    part.ended = true;
    part.problem = std::move(kept_.problem);
    state_ = State::kNone;
    kept_ = {};
  }
  return part;
}

absl::Status SessionRecording::Stop() {
  MutexLock lock(&mutex_);
  if (state_ == State::kNone) return absl::NotFoundError("this guest is not being recorded");
  if (state_ != State::kEnded) Finish("");
  return absl::OkStatus();
}

void SessionRecording::Finish(const std::string& problem) {
  state_ = State::kEnded;
  kept_.problem = problem;
}

absl::Status SessionRecording::Step(WriteRecorder* recorder, absl::Time now) {
  State state;
  {
    MutexLock lock(&mutex_);
    if (state_ == State::kRunning && now - last_taken_ > kLongestSilence) {
      Finish("nobody fetched what was recorded");
    }
    state = state_;
  }
  absl::Status status;
  if (state == State::kAsked) {
    status = Begin(recorder, now);
  } else if (state == State::kRunning) {
    if (now >= next_scan_) status = Scan(recorder, now);
  } else if (recorder->recording()) {
    recorder->StopRecording();
  }
  if (!status.ok()) End(std::string(status.message()));
  return status;
}

absl::Status SessionRecording::Begin(WriteRecorder* recorder, absl::Time now) {
  if (recorder->recording()) recorder->StopRecording();  // the one before this
  if (absl::Status s = recorder->StartRecording(); !s.ok()) return s;
  MutexLock lock(&mutex_);
  if (state_ == State::kAsked) state_ = State::kRunning;
  next_scan_ = now + interval_;
  return absl::OkStatus();
}

// Scans lie on a grid, so that a trace's time is the guest's. One that came late by whole intervals
// stands for those, and they are empty.
absl::Status SessionRecording::Scan(WriteRecorder* recorder, absl::Time now) {
  if (absl::Status s = recorder->TakeScan(&written_); !s.ok()) return s;
  MutexLock lock(&mutex_);
  if (state_ != State::kRunning) return absl::OkStatus();
  for (next_scan_ += interval_; next_scan_ <= now; next_scan_ += interval_) {
    kept_.ends.push_back(kept_.runs.size());
    ++kept_.missed;
  }
  kept_.runs.insert(kept_.runs.end(), written_.begin(), written_.end());
  kept_.ends.push_back(kept_.runs.size());
  if (kept_.runs.size() > kMostRuns) Finish("what was recorded was not fetched in time");
  return absl::OkStatus();
}

void SessionRecording::End(const std::string& why) {
  MutexLock lock(&mutex_);
  if (state_ == State::kAsked || state_ == State::kRunning) Finish(why);
}

}  // namespace presync
