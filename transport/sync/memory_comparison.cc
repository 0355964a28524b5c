#include "transport/sync/memory_comparison.h"

#include <algorithm>
#include <utility>

#include "predictor/check.h"

namespace presync {
namespace {

// The hashes of all ranges fit one reply (kMaxHashReplyBytes of the target) ...
constexpr PageCount kMostRanges = 32768;
// ... and a page sent meanwhile costs the target no more than 32 KiB to hash again where it can be.
constexpr PageCount kLeastPagesPerHash = 8;

HashPlan PlanFor(const GuestMemory& memory) {
  const PageCount pages = memory.pages();
  const auto needed = static_cast<PageCount>((uint64_t{pages} + kMostRanges - 1) / kMostRanges);
  return {.run = {0, pages}, .pages_per_hash = std::max(kLeastPagesPerHash, needed), .only = {}};
}

}  // namespace

wire::ControlMessage MakeHashRequest(const HashPlan& plan) {
  wire::ControlMessage message;
  wire::HashRequest* request = message.mutable_hash_request();
  request->set_first_page(plan.run.first);
  request->set_pages(plan.run.count);
  request->set_pages_per_hash(plan.pages_per_hash);
  request->mutable_only()->Add(plan.only.begin(), plan.only.end());
  return message;
}

absl::Status CheckHashReply(const wire::HashReply& reply, const HashPlan& plan) {
  if (reply.first_page() == plan.run.first && reply.hashes().size() == plan.hashes() * kHashBytes) {
    return absl::OkStatus();
  }
  return absl::InvalidArgumentError("the target answered with other hashes than it was asked for");
}

MemoryComparison::MemoryComparison(const GuestMemory* memory, SourceSync* sync)
    : memory_(memory), sync_(sync), all_(PlanFor(*memory)) {}

wire::ControlMessage MemoryComparison::Ask(HashPlan plan) {
  PRESYNC_CHECK(!awaits_reply());
  asked_ = std::move(plan);
  return MakeHashRequest(*asked_);
}

wire::ControlMessage MemoryComparison::HashAhead() { return Ask(all_); }

absl::Status MemoryComparison::OnReply(const wire::HashReply& reply) {
  if (!awaits_reply()) return absl::InvalidArgumentError("the target sent hashes unasked");
  if (absl::Status s = CheckHashReply(reply, *asked_); !s.ok()) return s;
  if (asked_->only.empty()) {
    theirs_ = reply.hashes();
  } else {
    for (size_t i = 0; i < asked_->only.size(); ++i) {
      theirs_.replace(asked_->only[i] * kHashBytes, kHashBytes, reply.hashes(), i * kHashBytes,
                      kHashBytes);
    }
  }
  asked_.reset();
  return absl::OkStatus();
}

void MemoryComparison::OnGuestStopped() {
  ours_ = std::async(std::launch::async, [this] { return HashPages(*memory_, all_); });
}

void MemoryComparison::OnWrittenSinceStop() {
  ours_.wait();
  OnGuestStopped();
}

std::optional<wire::ControlMessage> MemoryComparison::HashAgain() {
  HashPlan again = all_;
  std::vector<PageRun> written;
  sync_->noted_writes().AppendRunsWithin(all_.run, &written);
  for (const PageRun& run : written) {
    const PageCount last = (run.end() - 1) / all_.pages_per_hash;
    for (PageCount range = run.first / all_.pages_per_hash; range <= last; ++range) {
      if (again.only.empty() || again.only.back() < range) again.only.push_back(range);
    }
  }
  if (again.only.empty()) return std::nullopt;
  return Ask(std::move(again));
}

absl::StatusOr<std::vector<PageRun>> MemoryComparison::Differing() {
  PRESYNC_CHECK(!awaits_reply());
  const absl::StatusOr<std::string> ours = ours_.get();
  if (!ours.ok()) return ours.status();
  return DifferingRanges(all_, *ours, theirs_);
}

}  // namespace presync
