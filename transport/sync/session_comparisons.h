// When a session compares, and what became of it: comparisons that a person ordered, the background
// audit, and the proof of an older copy that was taken up again.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "transport/mutex.h"
#include "transport/sync/live_comparison.h"
#include "transport/wire/control_channel.h"

namespace presync {

// What a person sees of all comparisons of a session.
struct ComparisonStatus {
  // Since the session began: pages that were compared, and that differed though they must not have.
  uint64_t pages_compared = 0;
  uint64_t pages_differing = 0;
  uint64_t hash_bytes = 0;  // on the control connection, both ways
  // Unsettled pages (unsettled_pages.h) that were found to have changed unseen, and are sent again.
  uint64_t pages_repaired = 0;
  // The audit: how often it went through all memory, and what the last time found.
  uint64_t audits = 0;
  absl::Time audited_at = absl::InfinitePast();
  ComparisonReport audit;
  // The proof of an older copy: pages that were looked at so far, and whether it goes on.
  bool proving = false;
  ComparisonReport proof;
};

class SessionComparisons {
 public:
  struct Options {
    uint64_t audit_bytes_per_s = 0;  // of guest memory; 0: no audit
    // How often pages that are ripe are compared when they are few. Till then they wait: one that
    // is written again meanwhile costs nothing, and a launch compares 2,000 in 0.5 ms.
    absl::Duration settle_few_every = absl::Seconds(30);
    std::function<void(bool problem, const std::string& line)> log;
    std::string guest;
    std::string peer;
    // Called before the answer to Verify is given, so that whoever reads status() by way of the
    // session finds it there. The session's thread.
    std::function<void()> publish = [] {};
  };
  // `memory` must outlive it.
  SessionComparisons(Options options, const GuestMemory* memory);

  // Any thread: compares all memory, and blocks until that is done or was ended; ABORTED or
  // FAILED_PRECONDITION then says why. FAILED_PRECONDITION too while another one is under way.
  absl::StatusOr<ComparisonReport> Verify() ABSL_LOCKS_EXCLUDED(mutex_);

  // --- The session's thread ---

  // One step; call it every few milliseconds while the session is connected to a target that can
  // hash. `may_begin`: something new may begin, apart from a proof, which goes first, and settling.
  // Errors: the channel's and the dirty log's.
  absl::Status Step(SourceSync* sync, ControlChannel* channel, bool may_begin, absl::Time now)
      ABSL_LOCKS_EXCLUDED(mutex_);
  // An id for hash requests of somebody else: no other request of the session has had it.
  uint32_t NewHashId() { return NextHashId(&last_id_); }
  // The target's answer. Errors as LiveComparison.
  absl::Status OnReply(const wire::HashReply& reply);
  bool awaits_reply() const { return current_ != nullptr && current_->awaits_reply(); }
  // Whether somebody waits for its end: the others have time.
  bool hurried() const {
    return current_ != nullptr && (kind_ == Kind::kProof || kind_ == Kind::kOrdered);
  }
  // The comparison under way ends without a result, and who waits for one is told `why`.
  void Drop(const absl::Status& why) ABSL_LOCKS_EXCLUDED(mutex_);
  // The same, but pages go on being settled.
  void DropButSettling(const absl::Status& why) ABSL_LOCKS_EXCLUDED(mutex_);
  // The same for ever.
  void End(const absl::Status& why) ABSL_LOCKS_EXCLUDED(mutex_);

  ComparisonStatus status() const;

 private:
  enum class Kind { kProof, kOrdered, kSettling, kAudit };
  struct Order {
    bool done = false;
    absl::StatusOr<ComparisonReport> result = absl::UnknownError("not compared");
  };

  void Begin(SourceSync* sync, bool may_begin, absl::Time now);
  void BeginOne(Kind kind, SourceSync* sync, PageRun run, PageCount piece_pages);
  void Finish(SourceSync* sync, absl::Time now);
  void TellDiffering(const ComparisonReport& report) const;
  bool Ordered() const ABSL_LOCKS_EXCLUDED(mutex_);
  void Answer(absl::StatusOr<ComparisonReport> result) ABSL_LOCKS_EXCLUDED(mutex_);

  const Options options_;
  const GuestMemory* const memory_;

  // The session thread's own.
  std::unique_ptr<LiveComparison> current_;
  Kind kind_ = Kind::kAudit;
  uint32_t last_id_ = 0;  // of hash requests: an answer that comes late fits none that follow
  absl::Time asked_at_ = absl::InfinitePast();
  PageIndex audit_next_ = 0;
  absl::Time next_audit_ = absl::InfinitePast();
  absl::Time next_few_ = absl::InfinitePast();
  ComparisonReport audit_so_far_;
  ComparisonStatus status_;

  mutable Mutex mutex_;
  Order* order_ ABSL_GUARDED_BY(mutex_) = nullptr;
  absl::Status ended_ ABSL_GUARDED_BY(mutex_);  // ok until End
};

}  // namespace presync
