#include "tools/bench/link_bench.h"

#include <sys/resource.h>

#include <algorithm>
#include <random>
#include <vector>

#include "absl/strings/str_cat.h"
#include "transport/clock.h"

namespace presync {
namespace {

// Before the clock starts: caches and queues fill, as perftest's --perform_warm_up does.
constexpr uint64_t kWarmUpBytes = 4 << 20;

absl::Duration CpuTime() {
  rusage usage;
  ::getrusage(RUSAGE_SELF, &usage);
  return absl::DurationFromTimeval(usage.ru_utime) + absl::DurationFromTimeval(usage.ru_stime);
}

// The messages of one lap through memory, and which of them are under way.
class Lap {
 public:
  Lap(PageCount pages, PageCount message_pages, LinkPattern pattern)
      : stride_(message_pages + (pattern == LinkPattern::kScattered ? 1 : 0)) {
    for (PageIndex first = 0; first + message_pages <= pages; first += stride_) {
      writes_.push_back({{first, message_pages}});
    }
    if (pattern == LinkPattern::kScattered) {
      std::shuffle(writes_.begin(), writes_.end(), std::mt19937(1));  // the same places each time
    }
    posted_.resize(writes_.size(), absl::InfinitePast());
  }

  size_t size() const { return writes_.size(); }

  // The next messages, at most `count`: none of them is under way, and they lie in one row.
  absl::Span<const PageWrite> Next(uint64_t count) const {
    size_t end = next_;
    while (end < writes_.size() && end - next_ < count &&
           posted_[Slot(writes_[end])] == absl::InfinitePast()) {
      ++end;
    }
    return absl::MakeSpan(writes_).subspan(next_, end - next_);
  }

  void Post(size_t count, absl::Time now) {
    for (size_t i = 0; i < count; ++i) posted_[Slot(writes_[next_ + i])] = now;
    next_ = (next_ + count) % writes_.size();
  }

  absl::Duration Complete(const PageWrite& write, absl::Time now) {
    absl::Time& posted = posted_[Slot(write)];
    return now - std::exchange(posted, absl::InfinitePast());
  }

 private:
  size_t Slot(const PageWrite& write) const { return write.run.first / stride_; }

  const PageCount stride_;
  std::vector<PageWrite> writes_;   // in the order they are posted
  std::vector<absl::Time> posted_;  // by place in memory; InfinitePast: not under way
  size_t next_ = 0;
};

absl::Duration Percentile(std::vector<absl::Duration>* values, int percent) {
  if (values->empty()) return absl::ZeroDuration();
  const size_t rank = std::min(values->size() - 1, values->size() * percent / 100);
  std::nth_element(values->begin(), values->begin() + static_cast<ptrdiff_t>(rank), values->end());
  return (*values)[rank];
}

class Run {
 public:
  Run(SourceLink* link, Lap* lap, uint32_t depth, absl::Duration timeout)
      : link_(link), lap_(lap), depth_(depth), timeout_(timeout) {}

  // Posts until `messages` are posted or it is `until`, then has all of it confirmed.
  absl::Status Go(uint64_t messages, absl::Time until);

  uint64_t completed() const { return completed_; }
  std::vector<absl::Duration>* latencies() { return &latencies_; }

 private:
  absl::Status Collect();
  absl::Status AwaitNews();

  SourceLink* const link_;
  Lap* const lap_;
  const uint32_t depth_;
  const absl::Duration timeout_;
  uint64_t posted_ = 0;
  uint64_t completed_ = 0;
  std::vector<absl::Duration> latencies_;
  LinkEvents events_;
};

absl::Status Run::Go(uint64_t messages, absl::Time until) {
  latencies_.reserve(1 << 20);
  while (posted_ < messages) {
    const uint64_t room = std::min(depth_ - (posted_ - completed_), messages - posted_);
    const absl::Span<const PageWrite> next = lap_->Next(room);
    const absl::Time now = MonotonicNow();
    if (now >= until) break;
    size_t taken = 0;
    if (!next.empty()) {
      absl::StatusOr<size_t> posted = link_->Post(next);
      if (!posted.ok()) return posted.status();
      lap_->Post(taken = *posted, now);
      posted_ += taken;
    }
    if (absl::Status s = taken > 0 ? Collect() : AwaitNews(); !s.ok()) return s;
  }
  absl::StatusOr<CommitId> commit = link_->PostCommit();
  if (!commit.ok()) return commit.status();
  while (events_.committed < *commit || completed_ < posted_) {
    if (absl::Status s = AwaitNews(); !s.ok()) return s;
  }
  return absl::OkStatus();
}

absl::Status Run::Collect() {
  events_.Clear();
  if (absl::Status s = link_->Poll(&events_); !s.ok()) return s;
  if (events_.completed.empty()) return absl::OkStatus();
  const absl::Time now = MonotonicNow();
  for (const PageWrite& write : events_.completed) latencies_.push_back(lap_->Complete(write, now));
  completed_ += events_.completed.size();
  return absl::OkStatus();
}

absl::Status Run::AwaitNews() {
  const uint64_t completed = completed_;
  const CommitId committed = events_.committed;
  if (absl::Status s = Collect(); !s.ok()) return s;
  if (completed_ != completed || events_.committed != committed) return absl::OkStatus();
  const absl::Time deadline = MonotonicNow() + timeout_;
  if (absl::Status s = link_->Wait(deadline); !s.ok()) return s;
  if (MonotonicNow() >= deadline) {
    return absl::DeadlineExceededError(absl::StrCat("the link made no progress for ",
                                                    absl::FormatDuration(timeout_), ", with ",
                                                    posted_ - completed_, " messages under way"));
  }
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<LinkBenchResult> MeasureLink(SourceLink* link, const GuestMemory& memory,
                                            const LinkBenchOptions& options) {
  const uint64_t bytes = options.message_bytes;
  if (bytes == 0 || bytes % kPageBytes != 0 || bytes > PagesToBytes(memory.pages()) ||
      options.depth == 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("a message has whole pages of 4096 bytes, at most the memory's ",
                     PagesToBytes(memory.pages()), " bytes, and the depth is at least 1; not ",
                     bytes, " bytes"));
  }
  Lap lap(memory.pages(), static_cast<PageCount>(bytes / kPageBytes), options.pattern);
  const uint32_t depth = static_cast<uint32_t>(std::min<uint64_t>(options.depth, lap.size()));
  const uint64_t messages = options.messages > 0 ? options.messages : UINT64_MAX;

  Run warm_up(link, &lap, depth, options.timeout);
  const uint64_t warm_up_messages = std::max<uint64_t>(1, kWarmUpBytes / bytes);
  if (absl::Status s = warm_up.Go(std::min(messages, warm_up_messages), absl::InfiniteFuture());
      !s.ok()) {
    return s;
  }
  Run run(link, &lap, depth, options.timeout);
  const absl::Duration cpu = CpuTime();
  const absl::Time start = MonotonicNow();
  const absl::Time until = options.messages > 0 ? absl::InfiniteFuture() : start + options.duration;
  if (absl::Status s = run.Go(messages, until); !s.ok()) return s;
  LinkBenchResult result;
  result.elapsed = MonotonicNow() - start;
  result.cpu = CpuTime() - cpu;
  result.message_bytes = bytes;
  result.depth = depth;
  result.messages = run.completed();
  result.latency_p50 = Percentile(run.latencies(), 50);
  result.latency_p90 = Percentile(run.latencies(), 90);
  result.latency_p99 = Percentile(run.latencies(), 99);
  return result;
}

}  // namespace presync
