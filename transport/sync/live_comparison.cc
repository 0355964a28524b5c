#include "transport/sync/live_comparison.h"

#include <algorithm>
#include <utility>

#include "predictor/check.h"
#include "transport/sync/memory_comparison.h"

namespace presync {
namespace {

// One hash for so many pages at first: 1 byte a page on the wire, and a page that differs costs 16
// hashes more. Of a guest that ran on for a while a few pages in a hundred differ: then 8 to 32 are
// about equally good.
constexpr PageCount kPagesPerRange = 16;

// Pages among which those of a piece are looked for that are ripe: 1 GiB, so that each look at the
// guest's devices is followed by few requests.
constexpr PageCount kMostRipeWindowPages = PageCount{1} << 18;

// Pieces that wait for the next look at the dirty log: bounds what is held, some KiB each.
constexpr size_t kMostUnjudged = 64;

// So many looks at the guest's devices after a page was found to differ, a read that had filled it
// by then has been counted by its device. A guest whose devices say nothing is not waited for
// forever.
constexpr uint64_t kLooksToTell = 2;
constexpr uint64_t kMostScansToWait = 100;

uint64_t WireBytes(const google::protobuf::MessageLite& message) {
  return message.ByteSizeLong() + sizeof(uint32_t);
}

// Pages of one piece, numbered from its beginning.
class PieceSet {
 public:
  PieceSet(PageRun run, bool value) : run_(run), pages_(run.count, value) {}
  void Add(const std::vector<PageRun>& runs) {
    for (const PageRun& run : runs) pages_.Set({run.first - run_.first, run.count});
  }
  void Remove(const std::vector<PageRun>& runs) {
    for (const PageRun& run : runs) pages_.Clear({run.first - run_.first, run.count});
  }
  void Keep(const PieceSet& other) { pages_.And(other.pages_); }
  std::vector<PageRun> Runs() const {
    std::vector<PageRun> runs;
    pages_.AppendRunsWithin({0, run_.count}, &runs);
    for (PageRun& run : runs) run.first += run_.first;
    return runs;
  }

 private:
  const PageRun run_;
  PageBitmap pages_;
};

}  // namespace

void ComparisonReport::Add(const ComparisonReport& other) {
  compared += other.compared;
  aside += other.aside;
  differing += other.differing;
  repaired += other.repaired;
  hash_bytes += other.hash_bytes;
  for (const PageIndex page : other.named) {
    if (named.size() < kMostNamed) named.push_back(page);
  }
}

LiveComparison::LiveComparison(const GuestMemory* memory, SourceSync* sync, Goal goal, PageRun run,
                               PageCount piece_pages, uint32_t* last_id)
    : memory_(memory),
      sync_(sync),
      goal_(goal),
      run_(run),
      piece_pages_(piece_pages),
      last_id_(last_id),
      next_(run.first) {
  PRESYNC_CHECK(piece_pages > 0 && piece_pages <= kMostPiecePages);
}

uint32_t NextHashId(uint32_t* last_id) {
  if (++*last_id == 0) ++*last_id;
  return *last_id;
}

absl::Status LiveComparison::Step(Send send) {
  if (absl::Status s = JudgeDue(); !s.ok()) return s;
  if (asked_) return absl::OkStatus();
  if (again_) {
    HashPlan plan = *std::exchange(again_, std::nullopt);
    return Ask(std::move(plan), send);
  }
  if (AtEnd() || unjudged_.size() >= kMostUnjudged) return absl::OkStatus();
  HashPlan plan;
  const absl::StatusOr<bool> begun = BeginPiece(&plan);
  if (!begun.ok()) return begun.status();
  return *begun ? Ask(std::move(plan), send) : absl::OkStatus();
}

// The order is what makes it true: watched first, then looked at, here and there.
absl::StatusOr<bool> LiveComparison::BeginPiece(HashPlan* plan) {
  if (goal_ == Goal::kSettle) return BeginRipePiece(plan);
  piece_ = {.run = {next_, std::min(piece_pages_, run_.end() - next_)}};
  next_ = piece_.run.end();
  *plan = {.run = piece_.run, .pages_per_hash = kPagesPerRange, .only = {}};
  if (goal_ == Goal::kVerify) {
    sync_->Watch(piece_.run);
    return true;
  }
  if (absl::Status s = sync_->ArmAndWatch(piece_.run); !s.ok()) return s;
  absl::StatusOr<std::vector<PageRun>> holes = HolesOf(*memory_, piece_.run);
  if (!holes.ok()) return holes.status();
  piece_.holes = *std::move(holes);
  return true;
}

// Few pages of many are ripe: they are asked for one by one, and a piece reaches as far as it takes
// to find enough of them.
bool LiveComparison::BeginRipePiece(HashPlan* plan) {
  const PageBitmap& ripe = sync_->unsettled().ripe();
  const std::optional<PageRun> first = ripe.NextRun(next_);
  if (!first) {
    next_ = run_.end();
    return false;
  }
  PageRun window = {first->first, std::min(kMostRipeWindowPages, run_.end() - first->first)};
  piece_ = {.doubts = sync_->unsettled().doubts()};
  *plan = {.pages_per_hash = 1};
  std::vector<PageRun> within;
  ripe.AppendRunsWithin(window, &within);
  for (PageRun run : within) {
    run.count = std::min<PageCount>(run.count, piece_pages_ - plan->only.size());
    piece_.asked.push_back(run);
    for (PageIndex page = run.first; page < run.end(); ++page) {
      plan->only.push_back(page - window.first);
    }
    if (plan->only.size() == piece_pages_) {
      window.count = run.end() - window.first;
      break;
    }
  }
  piece_.run = plan->run = window;
  next_ = window.end();
  sync_->Watch(window);
  return true;
}

absl::Status LiveComparison::Ask(HashPlan plan, Send send) {
  wire::ControlMessage message = MakeHashRequest(plan);
  message.mutable_hash_request()->set_id(NextHashId(last_id_));
  report_.hash_bytes += WireBytes(message);
  if (absl::Status s = send(message); !s.ok()) return s;
  absl::StatusOr<std::string> ours = HashPages(*memory_, plan);
  if (!ours.ok()) return ours.status();
  asked_ = {.plan = std::move(plan), .id = *last_id_, .ours = *std::move(ours)};
  return absl::OkStatus();
}

absl::Status LiveComparison::OnReply(const wire::HashReply& reply) {
  if (!asked_ || reply.id() != asked_->id) return absl::OkStatus();
  report_.hash_bytes += WireBytes(reply);
  if (absl::Status s = CheckHashReply(reply, asked_->plan); !s.ok()) return s;
  const Asked asked = *std::exchange(asked_, std::nullopt);
  std::vector<PageRun> differing = DifferingRanges(asked.plan, asked.ours, reply.hashes());
  if (asked.plan.pages_per_hash == 1 || differing.empty()) {
    EndPiece(std::move(differing));
    return absl::OkStatus();
  }
  // Page by page; those that are known to be touched by now are left aside in any case.
  PieceSet closer(piece_.run, false);
  closer.Add(differing);
  std::vector<PageRun> touched;
  sync_->AppendTouched(piece_.run, &touched);
  closer.Remove(touched);
  HashPlan plan = {.run = piece_.run, .pages_per_hash = 1, .only = {}};
  for (const PageRun& run : closer.Runs()) {
    for (PageIndex page = run.first; page < run.end(); ++page) {
      plan.only.push_back(page - piece_.run.first);
    }
  }
  if (plan.only.empty()) {
    EndPiece({});
  } else {
    again_ = std::move(plan);
  }
  return absl::OkStatus();
}

void LiveComparison::EndPiece(std::vector<PageRun> differing) {
  piece_.differing = std::move(differing);
  piece_.judge_at = sync_->scans() + 1;
  unjudged_.push_back(std::move(piece_));
}

absl::Status LiveComparison::JudgeDue() {
  while (!unjudged_.empty() && unjudged_.front().judge_at <= sync_->scans()) {
    Piece piece = std::move(unjudged_.front());
    unjudged_.pop_front();
    const absl::StatusOr<bool> judged = Judge(&piece);
    if (!judged.ok()) return judged.status();
    if (*judged) continue;
    piece.looked_again = true;
    piece.judge_at = sync_->scans() + 1;
    unjudged_.push_back(std::move(piece));
  }
  return absl::OkStatus();
}

// Whether it takes looks at the guest's devices to tell if a page of `differing` may differ: a read
// that took too long for what was presumed of it shows there when it has ended.
bool LiveComparison::MustWaitForLooks(Piece* piece, const std::vector<PageRun>& differing) {
  if (piece->look_needed == 0) {
    std::vector<PageRun> presumed;
    for (const PageRun& run : differing) sync_->unsettled().AppendPresumedWithin(run, &presumed);
    if (presumed.empty()) return false;
    piece->look_needed = sync_->unsettled().looks() + kLooksToTell;
    piece->wait_until = sync_->scans() + kMostScansToWait;
  }
  return sync_->unsettled().looks() < piece->look_needed && sync_->scans() < piece->wait_until;
}

absl::StatusOr<bool> LiveComparison::Judge(Piece* piece) {
  std::vector<PageRun> touched, unsettled;
  sync_->AppendTouched(piece->run, &touched);
  PieceSet differ(piece->run, false);
  differ.Add(piece->differing);
  differ.Remove(touched);
  const std::vector<PageRun> differing = differ.Runs();
  if (goal_ == Goal::kVerify && !differing.empty()) {
    if (!piece->looked_again) {
      // A page that left the guest's memory became zero, and no dirty log says so. If it came back
      // since, the next look at the log does.
      if (absl::Status s = sync_->FindDiscarded(); !s.ok()) return s;
      return false;
    }
    if (MustWaitForLooks(piece, differing)) return false;
  }
  sync_->unsettled().AppendUnsettledWithin(piece->run, &unsettled);
  sync_->Distrust(differing);
  PieceSet equal(piece->run, goal_ != Goal::kSettle);
  equal.Add(piece->asked);
  equal.Remove(touched);
  equal.Remove(differing);
  if (goal_ == Goal::kProve) {
    PieceSet zero(piece->run, false);
    zero.Add(piece->holes);
    zero.Keep(equal);
    sync_->MarkProven(equal.Runs(), zero.Runs());
  }
  if (goal_ == Goal::kSettle && piece->doubts == sync_->unsettled().doubts()) {
    sync_->MarkSettled(equal.Runs());
  }
  // Nothing but a copy that is being proven is known to differ by itself; of pages that are
  // unsettled it may be, and that is no fault.
  PieceSet faults = differ;
  if (goal_ != Goal::kProve) faults.Remove(unsettled);
  const std::vector<PageRun> faulty = faults.Runs();
  const PageCount repaired = CountPages(differing) - CountPages(faulty);
  report_.repaired += repaired;
  Record(*piece, CountPages(touched) + repaired, faulty);
  return true;
}

void LiveComparison::Record(const Piece& piece, PageCount aside,
                            const std::vector<PageRun>& differing) {
  report_.aside += aside;
  report_.compared += piece.run.count - aside;
  report_.differing += CountPages(differing);
  for (const PageRun& run : differing) {
    for (PageIndex page = run.first;
         page < run.end() && report_.named.size() < ComparisonReport::kMostNamed; ++page) {
      report_.named.push_back(page);
    }
  }
}

}  // namespace presync
