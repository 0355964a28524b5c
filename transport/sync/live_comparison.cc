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

// Pieces that wait for the next look at the dirty log: bounds what is held, some KiB each.
constexpr size_t kMostUnjudged = 64;

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

absl::Status LiveComparison::Step(Send send) {
  if (absl::Status s = JudgeDue(); !s.ok()) return s;
  if (asked_) return absl::OkStatus();
  if (again_) {
    HashPlan plan = *std::exchange(again_, std::nullopt);
    return Ask(std::move(plan), send);
  }
  if (next_ == run_.end() || unjudged_.size() >= kMostUnjudged) return absl::OkStatus();
  if (absl::Status s = BeginPiece(); !s.ok()) return s;
  return Ask({.run = piece_.run, .pages_per_hash = kPagesPerRange, .only = {}}, send);
}

// The order is what makes it true: watched first, then looked at, here and there.
absl::Status LiveComparison::BeginPiece() {
  piece_ = {
      .run = {next_, std::min(piece_pages_, run_.end() - next_)}, .holes = {}, .differing = {}};
  next_ = piece_.run.end();
  if (goal_ == Goal::kVerify) {
    sync_->Watch(piece_.run);
    return absl::OkStatus();
  }
  if (absl::Status s = sync_->ArmAndWatch(piece_.run); !s.ok()) return s;
  absl::StatusOr<std::vector<PageRun>> holes = HolesOf(*memory_, piece_.run);
  if (!holes.ok()) return holes.status();
  piece_.holes = *std::move(holes);
  return absl::OkStatus();
}

absl::Status LiveComparison::Ask(HashPlan plan, Send send) {
  wire::ControlMessage message = MakeHashRequest(plan);
  if (++*last_id_ == 0) ++*last_id_;  // 0 is a handover's
  message.mutable_hash_request()->set_id(*last_id_);
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

absl::StatusOr<bool> LiveComparison::Judge(Piece* piece) {
  std::vector<PageRun> touched;
  sync_->AppendTouched(piece->run, &touched);
  PieceSet differ(piece->run, false);
  differ.Add(piece->differing);
  differ.Remove(touched);
  const std::vector<PageRun> differing = differ.Runs();
  if (goal_ == Goal::kVerify && !differing.empty() && !piece->looked_again) {
    // A page that left the guest's memory became zero, and no dirty log says so. If it came back
    // since, the next look at the log does.
    if (absl::Status s = sync_->FindDiscarded(); !s.ok()) return s;
    return false;
  }
  sync_->Distrust(differing);
  if (goal_ == Goal::kProve) {
    PieceSet equal(piece->run, true);
    equal.Remove(touched);
    equal.Remove(differing);
    PieceSet zero(piece->run, false);
    zero.Add(piece->holes);
    zero.Keep(equal);
    sync_->MarkProven(equal.Runs(), zero.Runs());
  }
  Record(*piece, CountPages(touched), differing);
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
