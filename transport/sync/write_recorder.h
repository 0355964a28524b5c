// Records which pages a guest writes while something else uses its dirty log.
#pragma once

#include <memory>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "absl/types/span.h"
#include "predictor/bitmap.h"
#include "transport/dirty_log.h"
#include "transport/memory.h"

namespace presync {

// A dirty log in front of another one. Its user sees the other one's answers, as if nobody
// recorded. While recording, every page is armed in the log behind, again after each write, which
// costs the guest a fault for each page that it writes in each scan of the recording.
//
// Not thread-safe. Costs a bit a page, from the first recording on three, and while recording a
// look (DirtyLog::Peek) before each Arm.
class WriteRecorder final : public DirtyLog {
 public:
  // `memory` must outlive it.
  WriteRecorder(std::unique_ptr<DirtyLog> log, const GuestMemory* memory);

  // As the log behind.
  std::string_view name() const override { return log_->name(); }
  absl::Status Peek(std::vector<PageRun>* written) override;
  absl::Status Arm(absl::Span<const PageRun> runs) override;

  // From here on all writes are recorded. Errors as DirtyLog::Arm; then it does not record.
  // Precondition: it does not record.
  absl::Status StartRecording();
  // Replaces `*written` by the pages written since StartRecording or the last call, each once, as
  // ascending maximal runs within a region. Errors as DirtyLog. Precondition: it records.
  absl::Status TakeScan(std::vector<PageRun>* written);
  // Pages that only the recording had armed cost one more fault each, at most.
  void StopRecording();
  bool recording() const { return recording_; }

 private:
  absl::Status PeekArmed(std::vector<PageRun>* written);
  absl::Status Look();
  void AppendPieces(const PageBitmap& pages, std::vector<PageRun>* out) const;

  const std::unique_ptr<DirtyLog> log_;
  const GuestMemory* const memory_;
  bool recording_ = false;
  PageBitmap armed_;     // by the user, and not reported since
  PageBitmap reported_;  // written while armed by the user, who was not told yet
  PageBitmap scan_;      // written since the recording's last scan
  std::vector<PageRun> written_;
};

}  // namespace presync
