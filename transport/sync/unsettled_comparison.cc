#include "transport/sync/unsettled_comparison.h"

#include <algorithm>
#include <utility>

#include "predictor/check.h"
#include "transport/sync/memory_comparison.h"

namespace presync {
namespace {

// The hashes of one request fit its reply (kMaxHashReplyBytes of the target).
constexpr size_t kMostPagesAsked = 32768;

std::vector<PageIndex> PagesOf(const PageBitmap& bitmap) {
  std::vector<PageIndex> pages;
  pages.reserve(bitmap.count());
  std::optional<PageRun> run = bitmap.NextRun(0);
  for (; run; run = bitmap.NextRun(run->end())) {
    for (PageIndex page = run->first; page < run->end(); ++page) pages.push_back(page);
  }
  return pages;
}

}  // namespace

absl::Status PageHashQuery::Step(SendMessage send) {
  if (asked_ || asked_end_ == pages_.size()) return absl::OkStatus();
  const size_t count = std::min(pages_.size() - asked_end_, kMostPagesAsked);
  asked_ = PlanForPages(absl::MakeConstSpan(pages_).subspan(asked_end_, count));
  asked_end_ += count;
  wire::ControlMessage message = MakeHashRequest(*asked_);
  message.mutable_hash_request()->set_id(id_);
  return send(message);
}

absl::Status PageHashQuery::OnReply(const wire::HashReply& reply) {
  if (!asked_) return absl::InvalidArgumentError("the target sent hashes unasked");
  if (absl::Status s = CheckHashReply(reply, *asked_); !s.ok()) return s;
  asked_.reset();
  hashes_ += reply.hashes();
  return absl::OkStatus();
}

// What the link has under way is noted as written, so it is not asked for ahead.
UnsettledComparison::UnsettledComparison(const GuestMemory* memory, SourceSync* sync, uint32_t id)
    : memory_(memory), sync_(sync), id_(id) {
  PageBitmap pages = sync->Unsettled();
  pages.AndNot(sync->noted_writes());
  query_ = PageHashQuery(PagesOf(pages), id_);
}

UnsettledComparison::~UnsettledComparison() {
  if (ahead_.valid()) ahead_.wait();  // it uses the memory and the hashes
}

void UnsettledComparison::OnStandstill(PageBitmap pages) {
  PRESYNC_CHECK(query_.done());
  compared_ = pages.count();
  PageBitmap asked(memory_->pages());
  std::vector<PageIndex> known;
  std::string hashes;
  for (size_t i = 0; i < query_.pages().size(); ++i) {
    const PageIndex page = query_.pages()[i];
    if (!pages.Test(page) || sync_->noted_writes().Test(page)) continue;
    asked.Set({page, 1});
    known.push_back(page);
    hashes.append(query_.hashes(), i * kHashBytes, kHashBytes);
  }
  ahead_ =
      std::async(std::launch::async, [this, known = std::move(known), hashes = std::move(hashes)] {
        return DifferingPages(*memory_, known, hashes);
      });
  pages.AndNot(asked);
  rest_ = PagesOf(pages);
}

void UnsettledComparison::AskForTheRest() {
  PRESYNC_CHECK(query_.done());
  query_ = PageHashQuery(std::move(rest_), id_);
}

std::vector<PageRun> UnsettledComparison::Differing() {
  PRESYNC_CHECK(query_.done());
  std::vector<PageRun> differing = DifferingPages(*memory_, query_.pages(), query_.hashes());
  const std::vector<PageRun> ahead = ahead_.get();
  differing.insert(differing.end(), ahead.begin(), ahead.end());
  std::sort(differing.begin(), differing.end(),
            [](const PageRun& a, const PageRun& b) { return a.first < b.first; });
  return differing;
}

}  // namespace presync
