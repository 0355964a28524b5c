#include "transport/sync/write_recorder.h"

#include <utility>

#include "predictor/check.h"

namespace presync {

WriteRecorder::WriteRecorder(std::unique_ptr<DirtyLog> log, const GuestMemory* memory)
    : log_(std::move(log)), memory_(memory), armed_(memory->pages()), reported_(0), scan_(0) {}

// Without a recording: what the user did not arm is left out. Costs by what was written.
absl::Status WriteRecorder::PeekArmed(std::vector<PageRun>* written) {
  written_.clear();
  if (absl::Status s = log_->Peek(&written_); !s.ok()) return s;
  for (const PageRun& run : written_) {
    armed_.AppendRunsWithin(run, written);
    armed_.Clear(run);
  }
  return absl::OkStatus();
}

// Takes what the log behind has to say to both listeners. While recording every page is armed when
// it returns.
absl::Status WriteRecorder::Look() {
  written_.clear();
  if (absl::Status s = log_->Peek(&written_); !s.ok()) return s;
  std::vector<PageRun> for_user;
  for (const PageRun& run : written_) armed_.AppendRunsWithin(run, &for_user);
  for (const PageRun& run : for_user) {
    armed_.Clear(run);
    reported_.Set(run);
  }
  if (!recording_) return absl::OkStatus();
  for (const PageRun& run : written_) scan_.Set(run);
  return log_->Arm(written_);
}

absl::Status WriteRecorder::Peek(std::vector<PageRun>* written) {
  if (!recording_ && reported_.empty()) return PeekArmed(written);
  if (absl::Status s = Look(); !s.ok()) return s;
  AppendPieces(reported_, written);
  reported_.ClearAll();
  return absl::OkStatus();
}

absl::Status WriteRecorder::Arm(absl::Span<const PageRun> runs) {
  // A page that was not written is armed already, and arming it again would hide a write that falls
  // between the look and the arming from the recording. The user may be told of such a write,
  // though it came before the arming: that is on the safe side.
  const absl::Status armed = recording_ ? Look() : log_->Arm(runs);
  if (!armed.ok()) return armed;
  for (const PageRun& run : runs) {
    armed_.Set(run);
    if (!reported_.empty()) reported_.Clear(run);
  }
  return absl::OkStatus();
}

absl::Status WriteRecorder::StartRecording() {
  PRESYNC_CHECK(!recording_);
  if (scan_.size() == 0) reported_ = scan_ = PageBitmap(memory_->pages());
  if (absl::Status s = Look(); !s.ok()) return s;
  // Not what the user has armed: it may be written right now, and that must not be forgotten.
  PageBitmap others(memory_->pages(), true);
  others.AndNot(armed_);
  std::vector<PageRun> to_arm;
  AppendPieces(others, &to_arm);
  if (absl::Status s = log_->Arm(to_arm); !s.ok()) return s;
  scan_.ClearAll();
  recording_ = true;
  return absl::OkStatus();
}

absl::Status WriteRecorder::TakeScan(std::vector<PageRun>* written) {
  PRESYNC_CHECK(recording_);
  if (absl::Status s = Look(); !s.ok()) return s;
  written->clear();
  AppendPieces(scan_, written);
  scan_.ClearAll();
  return absl::OkStatus();
}

void WriteRecorder::StopRecording() { recording_ = false; }

void WriteRecorder::AppendPieces(const PageBitmap& pages, std::vector<PageRun>* out) const {
  PageIndex from = 0;
  while (const auto run = pages.NextRun(from)) {
    for (const PageRun& piece : memory_->SplitAtRegions(*run)) out->push_back(piece);
    from = run->end();
  }
}

}  // namespace presync
