#include "transport/fake/fake_link.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <deque>
#include <map>
#include <random>
#include <unordered_set>
#include <utility>

#include "absl/base/thread_annotations.h"
#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "transport/clock.h"
#include "transport/mutex.h"
#include "transport/zero_run.h"

namespace presync {
namespace {

using PageBytes = std::array<std::byte, kPageBytes>;

// A page of a write on its way. It is read (`bytes` set) before the write completes.
struct Parcel {
  uint64_t write_number;
  bool zero;
  std::unique_ptr<PageBytes> bytes;
};

struct Flight {
  PageWrite write;
  absl::Time posted;
};

struct Commit {
  CommitId id;
  uint64_t writes_before;  // the number of the last write it covers
};

uint64_t WireBytes(const PageWrite& write) {
  constexpr uint64_t kHeaderBytes = 24;  // as the TCP link's
  return kHeaderBytes + (write.zero ? 0 : PagesToBytes(write.run.count));
}

}  // namespace

// What both ends share.
class FakeWire {
 public:
  FakeWire(const GuestMemory* source, const GuestMemory* target, FakeLinkOptions options)
      : source_(source), target_(target), options_(std::move(options)), random_(options_.seed) {
    if (!options_.now) options_.now = MonotonicNow;
    if (!options_.wait_until) {
      options_.wait_until = [](absl::Time until) { absl::SleepFor(until - MonotonicNow()); };
    }
  }

  absl::StatusOr<size_t> Post(absl::Span<const PageWrite> writes);
  absl::StatusOr<CommitId> PostCommit();
  absl::Status Poll(LinkEvents* events);
  absl::Status Wait(absl::Time deadline);
  LinkStats stats();
  void SetPacing(uint64_t bytes_per_s);
  absl::Status target_health();
  void EndSource();
  void EndTarget();

 private:
  using Event = std::function<void()>;
  static bool Reached(const std::optional<uint64_t>& fault, uint64_t count) {
    return fault.has_value() && *fault == count;
  }

  void Advance() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  absl::Status Die(absl::string_view why) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void Start(const PageWrite& write) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void Read(PageIndex page) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void DeliverFirst(PageIndex page) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void DeliverUpTo(PageIndex page, uint64_t write_number) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void Complete(uint64_t number) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void Confirm(const Commit& commit) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  absl::Duration Delay() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  absl::Time Between(absl::Time from, absl::Time to) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void At(absl::Time time, Event event) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) {
    events_.emplace(time, std::move(event));
  }
  double Uniform() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) {
    return std::uniform_real_distribution<double>(0, 1)(random_);
  }

  const GuestMemory* const source_;
  const GuestMemory* const target_;
  FakeLinkOptions options_;

  Mutex mu_;
  std::mt19937_64 random_ ABSL_GUARDED_BY(mu_);
  std::multimap<absl::Time, Event> events_
      ABSL_GUARDED_BY(mu_);  // equal times: first in, first out
  // What was not delivered yet, by page, oldest first: at most the last was not read yet.
  std::map<PageIndex, std::deque<Parcel>> parcels_ ABSL_GUARDED_BY(mu_);
  // The numbered writes that no confirmed commit covers yet.
  std::deque<std::pair<uint64_t, PageRun>> unconfirmed_ ABSL_GUARDED_BY(mu_);
  std::map<uint64_t, Flight> flights_ ABSL_GUARDED_BY(mu_);  // writes not yet completed
  std::unordered_set<PageIndex> busy_ ABSL_GUARDED_BY(mu_);  // their pages
  std::deque<Commit> commits_ ABSL_GUARDED_BY(mu_);
  LinkEvents news_ ABSL_GUARDED_BY(mu_);
  bool has_news_ ABSL_GUARDED_BY(mu_) = false;
  absl::Status status_ ABSL_GUARDED_BY(mu_);         // of the source's end
  absl::Status target_status_ ABSL_GUARDED_BY(mu_);  // of the target's end
  bool target_open_ ABSL_GUARDED_BY(mu_) = true;
  absl::Time wire_free_ ABSL_GUARDED_BY(mu_) = absl::InfinitePast();
  absl::Time last_completion_ ABSL_GUARDED_BY(mu_) = absl::InfinitePast();
  absl::Time last_commit_ ABSL_GUARDED_BY(mu_) = absl::InfinitePast();
  uint64_t pacing_ ABSL_GUARDED_BY(mu_) = 0;
  uint64_t posts_ ABSL_GUARDED_BY(mu_) = 0;
  uint64_t polls_ ABSL_GUARDED_BY(mu_) = 0;
  uint64_t commit_calls_ ABSL_GUARDED_BY(mu_) = 0;
  uint64_t writes_ ABSL_GUARDED_BY(mu_) = 0;
  CommitId last_commit_id_ ABSL_GUARDED_BY(mu_) = 0;
  LinkStats stats_ ABSL_GUARDED_BY(mu_);
};

absl::Duration FakeWire::Delay() { return options_.latency + Uniform() * options_.jitter; }

absl::Time FakeWire::Between(absl::Time from, absl::Time to) {
  return from + Uniform() * (to - from);
}

void FakeWire::Advance() {
  const absl::Time now = options_.now();
  while (status_.ok() && !events_.empty() && events_.begin()->first <= now) {
    auto node = events_.extract(events_.begin());
    node.mapped()();
  }
}

absl::Status FakeWire::Die(absl::string_view why) {
  status_ = absl::UnavailableError(absl::StrCat("fake link: ", why));
  if (target_status_.ok()) target_status_ = status_;
  events_.clear();
  // A dying network delivers what it likes of what was on its way, but a page's newer bytes never
  // before its older ones.
  std::vector<PageIndex> pages;
  for (const auto& [page, waiting] : parcels_) pages.push_back(page);
  for (const PageIndex page : pages) {
    Read(page);
    while (parcels_.contains(page) && Uniform() < 0.5) DeliverFirst(page);
  }
  parcels_.clear();
  has_news_ = true;
  return status_;
}

void FakeWire::Read(PageIndex page) {
  const auto waiting = parcels_.find(page);
  if (waiting == parcels_.end()) return;
  Parcel& newest = waiting->second.back();
  if (newest.zero || newest.bytes != nullptr) return;
  newest.bytes = std::make_unique<PageBytes>();
  memcpy(newest.bytes->data(), source_->Bytes({page, 1}).data(), kPageBytes);
}

void FakeWire::DeliverFirst(PageIndex page) {
  const auto waiting = parcels_.find(page);
  const Parcel parcel = std::move(waiting->second.front());
  waiting->second.pop_front();
  if (waiting->second.empty()) parcels_.erase(waiting);
  if (!target_open_) return;
  if (parcel.zero) {
    ZeroRun(*target_, {page, 1});
  } else {
    memcpy(target_->Bytes({page, 1}).data(), parcel.bytes->data(), kPageBytes);
  }
}

void FakeWire::DeliverUpTo(PageIndex page, uint64_t write_number) {
  while (true) {
    const auto waiting = parcels_.find(page);
    if (waiting == parcels_.end() || waiting->second.front().write_number > write_number) return;
    DeliverFirst(page);
  }
}

void FakeWire::Start(const PageWrite& write) {
  const absl::Time now = options_.now();
  const uint64_t number = ++writes_;
  flights_[number] = {write, now};
  stats_.wire_bytes += WireBytes(write);
  (write.zero ? stats_.zero_bytes : stats_.payload_bytes) += PagesToBytes(write.run.count);
  stats_.queued_bytes += WireBytes(write);

  uint64_t rate = options_.bytes_per_s;
  if (pacing_ != 0) rate = rate == 0 ? pacing_ : std::min(rate, pacing_);
  wire_free_ = std::max(wire_free_, now);
  if (rate != 0) wire_free_ += absl::Seconds(static_cast<double>(WireBytes(write)) / rate);
  const absl::Time completion = wire_free_ + Delay();
  last_completion_ = std::max(last_completion_, completion);

  unconfirmed_.emplace_back(number, write.run);
  for (PageIndex page = write.run.first; page != write.run.end(); ++page) {
    busy_.insert(page);
    parcels_[page].push_back({number, write.zero, nullptr});
    const absl::Time read = Between(now, completion);
    At(read, [this, page] {
      mu_.AssertHeld();
      Read(page);
    });
    // One page in three arrives when it was read, one around the completion, one not before a
    // commit asks for it (or newer bytes of that page follow it).
    const double when = Uniform();
    if (when > 2.0 / 3) continue;
    const absl::Time arrival = when < 1.0 / 3 ? read : Between(read, completion + Delay());
    At(arrival, [this, page, number] {
      mu_.AssertHeld();
      DeliverUpTo(page, number);
    });
  }
  At(completion, [this, number] {
    mu_.AssertHeld();
    Complete(number);
  });
}

void FakeWire::Complete(uint64_t number) {
  const auto flight = flights_.find(number);
  const PageWrite write = flight->second.write;
  stats_.completion_latency = options_.now() - flight->second.posted;
  stats_.queued_bytes -= WireBytes(write);
  for (PageIndex page = write.run.first; page != write.run.end(); ++page) busy_.erase(page);
  news_.completed.push_back(write);
  has_news_ = true;
  flights_.erase(flight);
}

void FakeWire::Confirm(const Commit& commit) {
  while (!unconfirmed_.empty() && unconfirmed_.front().first <= commit.writes_before) {
    const PageRun run = unconfirmed_.front().second;
    for (PageIndex page = run.first; page != run.end(); ++page) {
      DeliverUpTo(page, commit.writes_before);
    }
    unconfirmed_.pop_front();
  }
  news_.committed = commit.id;
  has_news_ = true;
}

absl::StatusOr<size_t> FakeWire::Post(absl::Span<const PageWrite> writes) {
  MutexLock lock(&mu_);
  Advance();
  if (!status_.ok()) return status_;
  if (Reached(options_.faults.fail_post, ++posts_)) return Die("a scripted failure of Post");
  if (writes.empty()) return 0;
  if (!source_->IsWithinOneRegion(writes[0].run)) {
    return absl::InvalidArgumentError(absl::StrCat("fake link: run of ", writes[0].run.count,
                                                   " pages from ", writes[0].run.first,
                                                   " is not within one region"));
  }
  size_t limit = writes.size();
  if (Uniform() < options_.short_post_probability) {
    limit = std::uniform_int_distribution<size_t>(0, limit - 1)(random_);
    has_news_ = true;  // so that Wait returns: a second try may do better
  }
  for (size_t i = 0; i < limit; ++i) {
    const PageWrite& write = writes[i];
    if (!source_->IsWithinOneRegion(write.run)) return i;
    if (!flights_.empty() &&
        stats_.queued_bytes + WireBytes(write) > options_.max_in_flight_bytes) {
      return i;
    }
    for (PageIndex page = write.run.first; page != write.run.end(); ++page) {
      if (busy_.contains(page)) {
        return absl::InternalError(
            absl::StrCat("fake link: page ", page, " was posted again before it completed"));
      }
    }
    Start(write);
    if (Reached(options_.faults.drop_after_writes, writes_)) {
      return Die(absl::StrCat("dropped after ", writes_, " writes"));
    }
  }
  return limit;
}

absl::StatusOr<CommitId> FakeWire::PostCommit() {
  MutexLock lock(&mu_);
  Advance();
  if (!status_.ok()) return status_;
  if (Reached(options_.faults.fail_commit, ++commit_calls_)) {
    return Die("a scripted failure of PostCommit");
  }
  if (commits_.size() >= options_.max_commits) {
    return absl::ResourceExhaustedError(
        absl::StrCat("fake link: ", commits_.size(), " commits are under way"));
  }
  const Commit commit{++last_commit_id_, writes_};
  commits_.push_back(commit);
  // After every write before it, and after the commit before it.
  last_commit_ = std::max({options_.now(), last_completion_, last_commit_}) + Delay();
  At(last_commit_, [this, commit] {
    mu_.AssertHeld();
    commits_.pop_front();
    Confirm(commit);
  });
  return commit.id;
}

absl::Status FakeWire::Poll(LinkEvents* events) {
  MutexLock lock(&mu_);
  Advance();
  if (!status_.ok()) return status_;
  if (Reached(options_.faults.fail_poll, ++polls_)) return Die("a scripted failure of Poll");
  events->completed.insert(events->completed.end(), news_.completed.begin(), news_.completed.end());
  events->committed = news_.committed;
  news_.Clear();
  has_news_ = false;
  return absl::OkStatus();
}

absl::Status FakeWire::Wait(absl::Time deadline) {
  while (true) {
    absl::Time until = deadline;
    {
      MutexLock lock(&mu_);
      Advance();
      if (!status_.ok() || has_news_ || options_.now() >= deadline) return absl::OkStatus();
      if (!events_.empty()) until = std::min(until, events_.begin()->first);
    }
    options_.wait_until(until);
  }
}

LinkStats FakeWire::stats() {
  MutexLock lock(&mu_);
  Advance();
  return stats_;
}

void FakeWire::SetPacing(uint64_t bytes_per_s) {
  MutexLock lock(&mu_);
  pacing_ = bytes_per_s;
}

absl::Status FakeWire::target_health() {
  MutexLock lock(&mu_);
  Advance();
  return target_status_;
}

void FakeWire::EndSource() {
  MutexLock lock(&mu_);
  Advance();
  if (status_.ok()) Die("the source ended it").IgnoreError();
}

void FakeWire::EndTarget() {
  MutexLock lock(&mu_);
  Advance();
  target_open_ = false;
  if (target_status_.ok()) target_status_ = absl::CancelledError("fake link: closed by this host");
  if (status_.ok()) Die("the target closed it").IgnoreError();
}

FakeSourceLink::FakeSourceLink(std::shared_ptr<FakeWire> wire) : wire_(std::move(wire)) {}
FakeSourceLink::~FakeSourceLink() { wire_->EndSource(); }
absl::StatusOr<size_t> FakeSourceLink::Post(absl::Span<const PageWrite> writes) {
  return wire_->Post(writes);
}
absl::StatusOr<CommitId> FakeSourceLink::PostCommit() { return wire_->PostCommit(); }
absl::Status FakeSourceLink::Poll(LinkEvents* events) { return wire_->Poll(events); }
absl::Status FakeSourceLink::Wait(absl::Time deadline) { return wire_->Wait(deadline); }
LinkStats FakeSourceLink::stats() const { return wire_->stats(); }
void FakeSourceLink::SetPacing(uint64_t bytes_per_s) { wire_->SetPacing(bytes_per_s); }

FakeTargetLink::FakeTargetLink(std::shared_ptr<FakeWire> wire) : wire_(std::move(wire)) {}
FakeTargetLink::~FakeTargetLink() { Close(); }
absl::Status FakeTargetLink::health() const { return wire_->target_health(); }
void FakeTargetLink::Close() { wire_->EndTarget(); }

absl::StatusOr<FakeLink> FakeLink::Create(const GuestMemory* source_memory,
                                          const GuestMemory* target_memory,
                                          FakeLinkOptions options) {
  if (source_memory->pages() != target_memory->pages()) {
    return absl::InvalidArgumentError(absl::StrCat("fake link: the source has ",
                                                   source_memory->pages(), " pages, the target ",
                                                   target_memory->pages()));
  }
  auto wire = std::make_shared<FakeWire>(source_memory, target_memory, std::move(options));
  FakeLink link;
  link.source = std::make_unique<FakeSourceLink>(wire);
  link.target = std::make_unique<FakeTargetLink>(wire);
  return link;
}

}  // namespace presync
