#include "transport/sync/session_comparisons.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "transport/clock.h"

namespace presync {
namespace {

// Hashed between two looks at everything else: 4 MiB take about 1 ms.
constexpr PageCount kPiece = 1024;
// The audit takes so much at a time; a piece lasts for a look at the dirty log at least. The least
// disturbs nobody, not even a launch that is ordered in the middle of it.
constexpr absl::Duration kAuditEvery = absl::Milliseconds(250);
constexpr PageCount kLeastAuditPiece = 256;
// Pages that are ripe and wait for more.
constexpr PageCount kFewPages = 2048;
// A target that lives hashes a piece within milliseconds.
constexpr absl::Duration kReplyTimeout = absl::Minutes(1);

}  // namespace

SessionComparisons::SessionComparisons(Options options, const GuestMemory* memory)
    : options_(std::move(options)), memory_(memory) {}

absl::StatusOr<ComparisonReport> SessionComparisons::Verify() {
  Order order;
  MutexLock lock(&mutex_);
  if (!ended_.ok()) return ended_;
  if (order_ != nullptr) {
    return absl::FailedPreconditionError("a comparison was ordered already; wait for its end");
  }
  order_ = &order;
  const auto done = [&order] { return order.done; };
  mutex_.Await(done);
  return order.result;
}

bool SessionComparisons::Ordered() const {
  MutexLock lock(&mutex_);
  return order_ != nullptr;
}

void SessionComparisons::Answer(absl::StatusOr<ComparisonReport> result) {
  MutexLock lock(&mutex_);
  if (order_ == nullptr) return;
  order_->result = std::move(result);
  order_->done = true;
  order_ = nullptr;
}

absl::Status SessionComparisons::Step(SourceSync* sync, ControlChannel* channel, bool may_begin,
                                      absl::Time now) {
  if (current_ == nullptr) Begin(sync, may_begin, now);
  if (current_ == nullptr) return absl::OkStatus();
  const auto send = [channel](const wire::ControlMessage& message) {
    return channel->Send(message, MonotonicNow() + absl::Seconds(5));
  };
  const bool waited = current_->awaits_reply();
  if (absl::Status s = current_->Step(send); !s.ok()) return s;
  if (!waited) asked_at_ = now;
  if (current_->awaits_reply() && now - asked_at_ > kReplyTimeout) {
    return absl::UnavailableError(
        absl::StrCat(options_.peer, " does not answer with the hashes it was asked for"));
  }
  if (kind_ == Kind::kProof) status_.proof = current_->report();
  if (current_->done()) Finish(sync, now);
  return absl::OkStatus();
}

void SessionComparisons::Begin(SourceSync* sync, bool may_begin, absl::Time now) {
  const PageRun all = {0, memory_->pages()};
  status_.proving = sync->unproven();
  if (sync->unproven()) return BeginOne(Kind::kProof, sync, all, kPiece);
  if (may_begin && Ordered()) return BeginOne(Kind::kOrdered, sync, all, kPiece);
  // At any time: what is settled late is compared while the guest stands still.
  const PageCount ripe = sync->unsettled().ripe().count();
  if (ripe > kFewPages || (ripe > 0 && now >= next_few_)) {
    next_few_ = now + options_.settle_few_every;
    return BeginOne(Kind::kSettling, sync, all, LiveComparison::kMostPiecePages);
  }
  if (!may_begin || options_.audit_bytes_per_s == 0 || now < next_audit_) return;
  const double rate = static_cast<double>(options_.audit_bytes_per_s) / kPageBytes;
  const PageCount most = std::clamp<PageCount>(
      static_cast<PageCount>(std::min(rate * absl::ToDoubleSeconds(kAuditEvery), 1e9)),
      kLeastAuditPiece, LiveComparison::kMostPiecePages);
  const PageRun piece = {audit_next_, std::min(most, all.end() - audit_next_)};
  next_audit_ = std::max(next_audit_, now) + absl::Seconds(piece.count / rate);
  BeginOne(Kind::kAudit, sync, piece, most);
}

void SessionComparisons::BeginOne(Kind kind, SourceSync* sync, PageRun run, PageCount piece_pages) {
  kind_ = kind;
  const auto goal = kind == Kind::kProof      ? LiveComparison::Goal::kProve
                    : kind == Kind::kSettling ? LiveComparison::Goal::kSettle
                                              : LiveComparison::Goal::kVerify;
  current_ = std::make_unique<LiveComparison>(memory_, sync, goal, run, piece_pages, &last_id_);
}

absl::Status SessionComparisons::OnReply(const wire::HashReply& reply) {
  return current_ == nullptr ? absl::OkStatus() : current_->OnReply(reply);
}

void SessionComparisons::Finish(SourceSync* sync, absl::Time now) {
  const ComparisonReport report = current_->report();
  current_.reset();
  status_.hash_bytes += report.hash_bytes;
  status_.pages_repaired += report.repaired;
  if (kind_ == Kind::kSettling) return;
  status_.pages_compared += report.compared;
  if (kind_ == Kind::kProof) {
    sync->set_proven();
    status_.proving = false;
    return;
  }
  status_.pages_differing += report.differing;
  if (report.differing > 0) TellDiffering(report);
  if (kind_ == Kind::kOrdered) {
    options_.publish();
    return Answer(report);
  }
  audit_so_far_.Add(report);
  audit_next_ += report.compared + report.aside;
  if (audit_next_ < memory_->pages()) return;
  audit_next_ = 0;
  ++status_.audits;
  status_.audited_at = now;
  status_.audit = std::exchange(audit_so_far_, {});
}

void SessionComparisons::TellDiffering(const ComparisonReport& report) const {
  if (options_.log == nullptr) return;
  const bool one = report.differing == 1;
  options_.log(
      true,
      absl::StrCat(options_.guest, ": ", report.differing, one ? " page DIFFERS" : " pages DIFFER",
                   " on ", options_.peer, " though nobody was seen to write there (",
                   absl::StrJoin(report.named, ", "),
                   report.differing > report.named.size() ? ", ..." : "",
                   "); sent again. Something writes guest memory that dirty tracking does not see, "
                   "or spoils the copy, or presync is at fault: until that is known launch with "
                   "--verify only; keep the logs of both presyncd and report it"));
}

void SessionComparisons::Drop(const absl::Status& why) {
  if (current_ != nullptr) {
    status_.hash_bytes += current_->report().hash_bytes;
    current_.reset();
  }
  status_.proving = false;
  Answer(why);
}

void SessionComparisons::DropButSettling(const absl::Status& why) {
  if (current_ != nullptr && kind_ == Kind::kSettling) return Answer(why);
  Drop(why);
}

void SessionComparisons::End(const absl::Status& why) {
  {
    MutexLock lock(&mutex_);
    ended_ = why;
  }
  Drop(why);
}

ComparisonStatus SessionComparisons::status() const {
  ComparisonStatus status = status_;
  if (current_ != nullptr) status.hash_bytes += current_->report().hash_bytes;
  return status;
}

}  // namespace presync
