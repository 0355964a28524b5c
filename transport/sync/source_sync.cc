#include "transport/sync/source_sync.h"

#include <algorithm>
#include <utility>

#include "predictor/check.h"
#include "transport/sync/zero_pages.h"

namespace presync {
namespace {

// A commit costs the target one answer per stream; one per 8 MiB is noise even at 100 Gb/s (0.7
// ms), and one a second bounds what a broken link makes stale.
constexpr uint64_t kCommitEveryBytes = 8 << 20;
constexpr absl::Duration kCommitEvery = absl::Seconds(1);

// Longest single write: long enough for full RDMA and TCP efficiency, short enough that a page
// waits 9 ms at most behind another at 1 Gb/s.
constexpr PageCount kMaxWritePages = 256;

// What one step looks at, at most: 15 ms, as measured (3.6 us a page, 2 cores, 2026-11-30).
constexpr PageCount kMostPagesAtATime = 16 * kMaxWritePages;

// Holes appear by balloon and free-page reporting only, and a launch looks again: seldom is enough.
constexpr absl::Duration kHoleWalkEvery = absl::Seconds(5);

// A file's time of change advances with the kernel's tick: 10 ms at most.
constexpr absl::Duration kDiscardTimesDiffer = absl::Milliseconds(20);

// See ProbeRate. 10 ms at the rate that is known so far; 1 MiB is 9 ms at 1 Gb/s.
constexpr absl::Duration kProbeEvery = absl::Milliseconds(250);
constexpr absl::Duration kProbeUnderPressureEvery = absl::Seconds(2);
constexpr absl::Duration kProbeLasts = absl::Milliseconds(10);
constexpr uint64_t kLeastProbeBytes = 1 << 20;
constexpr uint64_t kMostProbeBytes = 64 << 20;

constexpr absl::Duration kMeterEvery = absl::Seconds(1);

}  // namespace

absl::StatusOr<std::unique_ptr<SourceSync>> SourceSync::Create(const GuestMemory* memory,
                                                               DirtyLog* log,
                                                               SourceSyncOptions options) {
  absl::StatusOr<std::unique_ptr<SendPolicy>> policy = MakePolicy(
      options.policy, memory->pages(),
      {.scans_per_second =
           static_cast<uint32_t>(std::max<int64_t>(absl::Seconds(1) / options.scan_interval, 1))});
  if (!policy.ok()) return policy.status();
  return std::unique_ptr<SourceSync>(
      new SourceSync(memory, log, std::move(options), *std::move(policy)));
}

SourceSync::SourceSync(const GuestMemory* memory, DirtyLog* log, SourceSyncOptions options,
                       std::unique_ptr<SendPolicy> policy)
    : memory_(memory),
      log_(log),
      options_(std::move(options)),
      policy_(std::move(policy)),
      pace_(options_.max_bytes_per_s, options_.scan_interval, options_.now()),
      ledger_(memory->pages(), /*target_is_zero=*/false),
      unsettled_(memory->pages(), options_.settle_after),
      maybe_holes_(memory->pages(), true) {
  // Nothing is on the target yet that could be discarded here.
  discards_seen_ = memory->LastDiscards().value_or(std::vector<int64_t>());
  discards_since_ = options_.now();
}

void SourceSync::NoteContent(TargetContent content) {
  PRESYNC_CHECK(link_ == nullptr);
  if (content == TargetContent::kKept) return;
  ledger_.OnTargetReset(content == TargetContent::kZero);
  first_pass_done_ = false;
  unproven_ = content == TargetContent::kUnproven;
}

void SourceSync::AttachLink(SourceLink* link, TargetContent content) {
  NoteContent(content);
  BeginWith(link);
}

void SourceSync::BeginWith(SourceLink* link) {
  link_ = link;
  held_ = false;
  pace_.Begin(link);
  open_sample_ = {.since = options_.now()};
  last_confirmed_ = absl::InfinitePast();
  next_probe_ = absl::InfinitePast();
  // Another kind of link has another rate: what was known of it, or nothing.
  const std::string kind(link->name());
  if (kind == link_kind_) return;
  kind_rates_[link_kind_] = link_rate_;
  link_rate_ = kind_rates_[kind];
  link_kind_ = kind;
}

void SourceSync::SwitchLink(SourceLink* link) {
  PRESYNC_CHECK(quiet());
  wire_bytes_before_ += link_->stats().wire_bytes;
  BeginWith(link);
}

void SourceSync::DetachLink() {
  if (link_ == nullptr) return;
  wire_bytes_before_ += link_->stats().wire_bytes;
  pace_.End();
  link_ = nullptr;
  held_ = drained_ = false;
  pending_.clear();
  noted_writes_.reset();
  ledger_.OnLinkLost();
}

void SourceSync::NoteWrites() {
  noted_writes_.emplace(memory_->pages());
  ledger_.AddUnconfirmed(&*noted_writes_);
}

absl::Status SourceSync::Tick() {
  const absl::Time now = options_.now();
  if (now >= next_scan_) {
    // Pressure that goes on although the pace was cut does not come from sending alone: look less
    // often too.
    const int stretch = pace_.pressed_intervals() >= 2 ? 2 : 1;
    next_scan_ = std::max(next_scan_ + stretch * options_.scan_interval, now);
    if (absl::Status s = Scan(); !s.ok()) return s;
    if (now >= next_hole_walk_) {
      next_hole_walk_ = now + kHoleWalkEvery;
      if (absl::Status s = FindDiscarded(); !s.ok()) return s;
    }
    pace_.OnInterval(now, link_rate_.bytes_per_s());
    if (pace_.paced()) open_sample_.saturated = commit_sample_.saturated = false;
    UpdateMeters(now);
  }
  if (link_ == nullptr) return absl::OkStatus();
  pace_.Sample();
  if (absl::Status s = Collect(); !s.ok()) return s;
  if (absl::Status s = PostPending(); !s.ok()) return s;
  if (unproven_) return CommitIfDue(/*now=*/false);
  if (held_) return pending_.empty() ? CommitIfDue(/*now=*/true) : absl::OkStatus();

  const bool rate_matters = !first_pass_done_ || pace_.rate_is_suspect();
  if (rate_matters && now >= next_probe_ && options_.max_bytes_per_s == 0) {
    if (absl::Status s = ProbeRate(now); !s.ok()) return s;
  }
  const PageCount set_point = SetPointPages(options_.max_launch_time, cost());
  first_pass_done_ |= ledger_.sendable().count() <= set_point || ledger_.first_pass_done();
  if (absl::Status s = SendAboveGoal(now); !s.ok()) return s;
  return CommitIfDue(/*now=*/false);
}

// Stale pages that the set-point has no room for. A policy may want to go below it, but the promise
// is kept whatever it wants.
PageCount SourceSync::AboveGoal() const {
  const PageCount set_point = SetPointPages(options_.max_launch_time, cost());
  const PageCount goal = std::min(set_point, policy_->Goal(set_point));
  return PagesToSend(ledger_.sendable().count(), goal, UINT64_MAX);
}

// Holes and zero pages cost the link nothing, so the pace does not count them: a choice without
// anything else in it is followed by another, at most of one long write.
absl::Status SourceSync::SendAboveGoal(absl::Time now) {
  PageCount above = AboveGoal();
  if (above == 0 || !pending_.empty()) return absl::OkStatus();
  if (urgent_) pace_.Lift();
  const uint64_t bytes = urgent_ ? UINT64_MAX : pace_.AvailableBytes(now);
  const PageCount allowed = PagesToSend(above, /*set_point=*/0, bytes);
  const bool all = allowed == above;
  // A few writes at a time keep the choice fresh; the link takes more at the next step.
  PageCount budget = std::min(allowed, 4 * kMaxWritePages);
  PageCount choice = budget;
  for (PageCount looked_at = 0;
       budget > 0 && above > 0 && pending_.empty() && looked_at < kMostPagesAtATime;) {
    choice = std::min(choice, above);
    const uint64_t before = pages_sent_;
    if (absl::Status s = Send(choice); !s.ok()) return s;
    above -= choice;
    looked_at += choice;
    const uint64_t paid = pages_sent_ - before;
    budget -= static_cast<PageCount>(std::min<uint64_t>(budget, paid));
    choice = paid > 0 ? budget : std::min(2 * choice, kMaxWritePages);
  }
  if (!all && (budget == 0 || !pending_.empty())) pace_.NoteStarved();
  return absl::OkStatus();
}

// The promise rests on the link's rate, which slow start alone would learn late: a burst that has
// to be sent anyway goes out at once, and how long its confirmation takes is the measurement. Long
// enough that the round trip does not count, short enough to disturb nobody. What the set-point has
// room for does not have to be sent: with nothing else there is no measurement.
absl::Status SourceSync::ProbeRate(absl::Time now) {
  const PageCount above = AboveGoal();
  if (above == 0 || !pending_.empty() || ledger_.in_flight() > 0 || ledger_.commit_under_way() ||
      ledger_.needs_commit()) {
    return absl::OkStatus();
  }
  next_probe_ = now + (pace_.pressed_intervals() == 0 ? kProbeEvery : kProbeUnderPressureEvery);
  const uint64_t worth = static_cast<uint64_t>(static_cast<double>(link_rate_.bytes_per_s()) *
                                               absl::ToDoubleSeconds(kProbeLasts));
  const uint64_t bytes = std::clamp(worth, kLeastProbeBytes, kMostProbeBytes);
  pace_.Lift();
  if (absl::Status s = Send(PagesToSend(above, /*set_point=*/0, bytes)); !s.ok()) return s;
  if (!pending_.empty()) return absl::OkStatus();  // back-pressure marks the sample by itself
  open_sample_.saturated = true;
  return CommitIfDue(/*now=*/true);
}

absl::Status SourceSync::Scan() {
  written_.clear();
  if (absl::Status s = log_->Peek(&written_); !s.ok()) return s;
  ++scans_;
  write_faults_ += CountPages(written_);
  ledger_.MarkStale(written_);
  for (const PageRun& run : written_) unsettled_.Forget(run);
  policy_->OnScan(written_);
  chosen_.clear();
  policy_->AppendPagesToArm(&chosen_);
  return ArmChosen();
}

// Policies know no regions; the dirty log wants runs within one. Leaves the cut runs in to_arm_.
absl::Status SourceSync::ArmChosen() {
  to_arm_.clear();
  for (const PageRun& run : chosen_) {
    for (const PageRun& piece : memory_->SplitAtRegions(run)) to_arm_.push_back(piece);
  }
  return log_->Arm(to_arm_);
}

absl::Status SourceSync::FindDiscarded() {
  const PageRun all = {0, memory_->pages()};
  absl::StatusOr<std::vector<PageRun>> holes = memory_->Holes(all);
  if (!holes.ok()) return holes.status();
  maybe_holes_.ClearAll();
  for (const PageRun& hole : *holes) maybe_holes_.Set(hole);
  ledger_.MarkDiscarded(*holes);
  return FindDiscardedAndRead();
}

// Reading a discarded page makes it a zero page again, and no dirty log reports that. So where the
// files' times tell that something was discarded, all pages that are not known to be zero on the
// target are looked at. The times are coarse: they count as dealt with once they have stood still
// for a while before a look.
absl::Status SourceSync::FindDiscardedAndRead() {
  absl::StatusOr<std::vector<int64_t>> discards = memory_->LastDiscards();
  if (!discards.ok()) return discards.status();
  if (*discards == discards_found_) return absl::OkStatus();
  const absl::Time now = options_.now();
  if (*discards != discards_seen_) {
    discards_seen_ = *std::move(discards);
    discards_since_ = now;
  } else if (now - discards_since_ >= kDiscardTimesDiffer) {
    discards_found_ = discards_seen_;
  }
  // Not those that are stale, holes among them: reading a hole would allocate it.
  std::vector<PageRun> nonzero, zero;
  ledger_.AppendTargetNonzero({0, memory_->pages()}, &nonzero);
  PageBitmap pages(memory_->pages());
  for (const PageRun& run : nonzero) pages.Set(run);
  pages.AndNot(ledger_.stale());
  for (std::optional<PageRun> run = pages.NextRun(0); run; run = pages.NextRun(run->end())) {
    for (const PageRun& piece : memory_->SplitAtRegions(*run)) {
      AppendZeroPages(memory_->Bytes(piece), piece.first, &zero);
    }
  }
  ledger_.MarkDiscarded(zero);
  return absl::OkStatus();
}

// Takes note of what the link finished and confirmed.
absl::Status SourceSync::Collect() {
  events_.Clear();
  if (absl::Status s = link_->Poll(&events_); !s.ok()) return s;
  for (const PageWrite& write : events_.completed) ledger_.OnCompleted(write);
  if (ledger_.commit_under_way()) {
    ledger_.OnCommitted(events_.committed);
    if (!ledger_.commit_under_way()) {
      const absl::Time now = options_.now();
      const absl::Time since = std::max(commit_sample_.since, last_confirmed_);
      link_rate_.OnSample(commit_sample_.bytes, now - since, commit_sample_.saturated);
      last_confirmed_ = now;
      if (commit_sample_.saturated) pace_.OnMeasured();
      pace_.Resume();
    }
  }
  return absl::OkStatus();
}

// Lets the policy choose up to `pages` sendable pages, arms them and queues the writes. The order
// is the invariant: armed first, read afterwards.
absl::Status SourceSync::Send(PageCount pages) {
  if (pages == 0) return absl::OkStatus();
  policy_->Choose(ledger_.sendable(), pages, &chosen_);
  if (absl::Status s = ArmChosen(); !s.ok()) return s;
  policy_->OnSent(to_arm_);
  for (const PageRun& run : to_arm_) {
    if (absl::Status s = Prepare(run); !s.ok()) return s;
  }
  return PostPending();
}

// Turns one armed run into writes: holes and zero pages without payload (or without any write where
// the target is zero already), the rest in pieces. Reading a hole would allocate it, so holes come
// first.
absl::Status SourceSync::Prepare(PageRun run) {
  maybe_.clear();
  maybe_holes_.AppendRunsWithin(run, &maybe_);
  PageIndex next = run.first;
  for (const PageRun& maybe : maybe_) {
    absl::StatusOr<std::vector<PageRun>> holes = memory_->RecheckHoles(maybe);
    if (!holes.ok()) return holes.status();
    for (const PageRun& hole : *holes) {
      if (hole.first > next) QueueNonHole({next, hole.first - next});
      unsettled_.Forget(hole);  // a page that a request has pinned is no hole
      QueueZero(hole);
      next = hole.end();
    }
  }
  if (run.end() > next) QueueNonHole({next, run.end() - next});
  return absl::OkStatus();
}

void SourceSync::NoteRead(PageRun run) {
  drained_ ? unsettled_.Forget(run) : unsettled_.OnRead(run);
}

void SourceSync::QueueNonHole(PageRun run) {
  NoteRead(run);
  const absl::Span<const std::byte> bytes = memory_->Bytes(run);
  PageCount done = 0;
  while (done < run.count) {
    const auto [zero, count] = NextZeroOrDataPages(bytes.subspan(PagesToBytes(done)));
    const PageRun piece = {run.first + done, count};
    done += count;
    if (zero) {
      QueueZero(piece);
      continue;
    }
    for (PageCount cut = 0; cut < count; cut += kMaxWritePages) {
      const PageRun write = {piece.first + cut, std::min(kMaxWritePages, count - cut)};
      ledger_.MarkInFlight(write);
      pending_.push_back({write, /*zero=*/false});
      pages_sent_ += write.count;
    }
  }
}

void SourceSync::QueueZero(PageRun run) {
  std::vector<PageRun> differ;
  ledger_.AppendTargetNonzero(run, &differ);
  ledger_.MarkSynced(run);
  for (const PageRun& write : differ) {
    ledger_.MarkStale({&write, 1});
    ledger_.MarkInFlight(write);
    pending_.push_back({write, /*zero=*/true});
    pages_zero_ += write.count;
  }
}

absl::Status SourceSync::PostPending() {
  while (!pending_.empty()) {
    // A deque is not contiguous: hand over its first stretch.
    PageWrite batch[64];
    const size_t count = std::min(pending_.size(), std::size(batch));
    std::copy_n(pending_.begin(), count, batch);
    absl::StatusOr<size_t> posted = link_->Post({batch, count});
    if (!posted.ok()) return posted.status();
    for (size_t i = 0; i < *posted; ++i) {
      ledger_.OnPosted(batch[i].run);
      if (noted_writes_) noted_writes_->Set(batch[i].run);
      if (batch[i].zero) continue;
      const uint64_t bytes = PagesToBytes(batch[i].run.count);
      pace_.Spend(bytes);
      if (open_sample_.bytes == 0) open_sample_.since = options_.now();
      open_sample_.bytes += bytes;
    }
    pending_.erase(pending_.begin(), pending_.begin() + static_cast<std::ptrdiff_t>(*posted));
    if (*posted < count) {
      open_sample_.saturated |= !pace_.paced();
      return absl::OkStatus();
    }
  }
  return absl::OkStatus();
}

absl::Status SourceSync::CommitIfDue(bool now) {
  // A sample is the link's rate only while the link has work: it ends when that is done, or is
  // none.
  const bool idle = pending_.empty() && ledger_.in_flight() == 0;
  if (idle && !now && (ledger_.commit_under_way() || open_sample_.bytes < kLeastProbeBytes)) {
    open_sample_.saturated = false;
  }
  if (ledger_.commit_under_way() || !ledger_.needs_commit()) return absl::OkStatus();
  const absl::Time time = options_.now();
  const bool due = open_sample_.bytes >= kCommitEveryBytes || (idle && open_sample_.saturated) ||
                   time - std::max(open_sample_.since, last_confirmed_) >= kCommitEvery;
  if (!now && !due) return absl::OkStatus();
  absl::StatusOr<CommitId> id = link_->PostCommit();
  if (!id.ok()) return id.status();
  ledger_.OnCommitPosted(*id);
  commit_sample_ = open_sample_;
  open_sample_ = {.since = time};
  return absl::OkStatus();
}

absl::Status SourceSync::PushAll() {
  pace_.Lift();
  if (absl::Status s = Collect(); !s.ok()) return s;
  if (absl::Status s = PostPending(); !s.ok()) return s;
  return pending_.empty() ? Send(ledger_.sendable().count()) : absl::OkStatus();
}

absl::Status SourceSync::Flush(absl::Time deadline) {
  while (true) {
    if (absl::Status s = PushAll(); !s.ok()) return s;
    if (ledger_.all_synced()) return absl::OkStatus();
    if (pending_.empty() && ledger_.sendable().empty()) {
      if (absl::Status s = CommitIfDue(/*now=*/true); !s.ok()) return s;
    }
    const absl::Time now = options_.now();
    if (now >= deadline) {
      return absl::DeadlineExceededError("the target did not confirm the residual in time");
    }
    if (absl::Status s = link_->Wait(std::min(deadline, now + absl::Milliseconds(20))); !s.ok()) {
      return s;
    }
  }
}

PageBitmap SourceSync::Unsettled() const {
  PageBitmap pages = unsettled_.All();
  pages.AndNot(ledger_.stale());
  return pages;
}

PageBitmap SourceSync::UnsettledAtStandstill(const RequestLook& last) {
  PageBitmap pages = unsettled_.AtStandstill(last);
  pages.AndNot(ledger_.stale());
  return pages;
}

void SourceSync::UpdateMeters(absl::Time now) {
  const absl::Duration elapsed = now - meter_since_;
  if (elapsed < kMeterEvery) return;
  const uint64_t wire = wire_bytes_before_ + (link_ != nullptr ? link_->stats().wire_bytes : 0);
  if (meter_since_ != absl::InfinitePast()) {
    const double seconds = absl::ToDoubleSeconds(elapsed);
    rate_bytes_per_s_ = static_cast<uint64_t>((wire - meter_wire_bytes_) / seconds);
    dirty_pages_per_s_ = (write_faults_ - meter_faults_) / seconds;
  }
  meter_since_ = now;
  meter_wire_bytes_ = wire;
  meter_faults_ = write_faults_;
}

SyncProgress SourceSync::progress() const {
  const PageCount residual = ledger_.residual();
  return {
      .pages = ledger_.pages(),
      .residual = residual,
      .set_point = SetPointPages(options_.max_launch_time, cost()),
      .unsettled = unsettled_.count(),
      .first_pass_done = first_pass_done_,
      .predicted_launch = PredictLaunchTime(residual, cost()),
      .rate_bytes_per_s = rate_bytes_per_s_,
      .allowed_bytes_per_s = pace_.rate_bytes_per_s(),
      .link_bytes_per_s = link_rate_.bytes_per_s(),
      .wire_bytes = wire_bytes_before_ + (link_ != nullptr ? link_->stats().wire_bytes : 0),
      .pages_sent = pages_sent_,
      .pages_zero = pages_zero_,
      .write_faults = write_faults_,
      .dirty_pages_per_s = dirty_pages_per_s_,
  };
}

}  // namespace presync
