// Compares source and target by hash while the guest runs: `presync verify`, the background audit,
// and the proof of an older copy that is taken up again.
//
// A piece of memory at a time. From a moment on it is *watched* here: what touches a page, the
// guest or the link, is noted. Then both sides hash it, in ranges, and page by page where those
// differ. When a look at the dirty log has followed, it is judged: a page that was not touched was
// the same all the time, on both sides, so its hashes tell; the others are left aside.
//
// docs/design.md, "Comparing while the guest runs", has the argument.
#pragma once

#include <cstdint>
#include <deque>
#include <optional>
#include <string>
#include <vector>

#include "absl/functional/function_ref.h"
#include "absl/status/status.h"
#include "predictor/bitmap.h"
#include "predictor/page.h"
#include "transport/memory.h"
#include "transport/sync/page_hash.h"
#include "transport/sync/source_sync.h"
#include "transport/wire/control_channel.h"

namespace presync {

// What one comparison found.
struct ComparisonReport {
  static constexpr size_t kMostNamed = 16;

  PageCount compared = 0;   // known to be equal, or to differ
  PageCount aside = 0;      // stale, with the link, written meanwhile, or repaired
  PageCount differing = 0;  // of those compared
  // Of those aside: unsettled, and found to be different. They are sent again, and no fault.
  PageCount repaired = 0;
  std::vector<PageIndex> named;  // the first of these, at most kMostNamed
  uint64_t hash_bytes = 0;       // of the messages, both ways
  void Add(const ComparisonReport& other);
};

// Counts `*last_id` on and returns it. 0 is left out: a handover's requests have that.
uint32_t NextHashId(uint32_t* last_id);

// One thread at a time may use it: the session's. Pages that differ are stale from then on.
class LiveComparison {
 public:
  enum class Goal {
    kVerify,  // pages that should be equal: those that are synced
    kProve,   // pages of a copy of which nothing is known: those that are equal become synced
    kSettle,  // pages that are ripe (unsettled_pages.h): those that are equal are settled
  };

  // Compares `run`, `piece_pages` at a time; hashing a piece here costs the caller of Step about
  // 0.3 ms a MiB. All must outlive it. `last_id` is the id of the conversation's last hash request,
  // and counts on. Precondition: 0 < piece_pages <= kMostPiecePages.
  LiveComparison(const GuestMemory* memory, SourceSync* sync, Goal goal, PageRun run,
                 PageCount piece_pages, uint32_t* last_id);

  // So that the answer fits a reply, page by page.
  static constexpr PageCount kMostPiecePages = 8192;

  // Sends the next request by `send`, if none is under way, and judges what can be judged. Call it
  // again and again, between other things, until done(). Errors: `send`'s, the dirty log's, and
  // those of HashPages.
  absl::Status Step(absl::FunctionRef<absl::Status(const wire::ControlMessage&)> send);

  // The target's answer. One to another request than the last is passed over. INVALID_ARGUMENT: it
  // does not fit its request.
  absl::Status OnReply(const wire::HashReply& reply);

  bool awaits_reply() const { return asked_.has_value(); }
  bool done() const { return AtEnd() && !asked_ && !again_ && unjudged_.empty(); }
  // Pages of the run that were judged so far: report().compared + report().aside.
  const ComparisonReport& report() const { return report_; }

 private:
  struct Asked {
    HashPlan plan;
    uint32_t id = 0;
    std::string ours;
  };
  struct Piece {
    PageRun run;
    std::vector<PageRun> holes = {};      // kProve: before its bytes were hashed
    std::vector<PageRun> asked = {};      // kSettle: the pages that were ripe
    std::vector<PageRun> differing = {};  // by hash
    uint64_t judge_at = 0;                // SourceSync::scans()
    uint64_t doubts = 0;                  // kSettle: UnsettledPages::doubts(), as it began
    bool looked_again = false;
    uint64_t look_needed = 0;  // kVerify: UnsettledPages::looks()
    uint64_t wait_until = 0;   // for that, SourceSync::scans()
  };
  using Send = absl::FunctionRef<absl::Status(const wire::ControlMessage&)>;

  bool AtEnd() const { return next_ == run_.end(); }
  // False: nothing of the run is left for it.
  absl::StatusOr<bool> BeginPiece(HashPlan* plan);
  bool BeginRipePiece(HashPlan* plan);
  absl::Status Ask(HashPlan plan, Send send);
  void EndPiece(std::vector<PageRun> differing);
  absl::Status JudgeDue();
  // False: a closer look has to come first.
  absl::StatusOr<bool> Judge(Piece* piece);
  bool MustWaitForLooks(Piece* piece, const std::vector<PageRun>& differing);
  void Record(const Piece& piece, PageCount aside, const std::vector<PageRun>& differing);

  const GuestMemory* const memory_;
  SourceSync* const sync_;
  const Goal goal_;
  const PageRun run_;
  const PageCount piece_pages_;
  uint32_t* const last_id_;

  PageIndex next_;
  Piece piece_;                    // that is being asked about
  std::optional<Asked> asked_;     // until the reply comes
  std::optional<HashPlan> again_;  // to be asked next: the pages of ranges that differ
  std::deque<Piece> unjudged_;
  ComparisonReport report_;
};

}  // namespace presync
