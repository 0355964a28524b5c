// What a launch does about unsettled pages (unsettled_pages.h): compares them with their copies
// once the guest stands still and its devices are drained, before the target loads anything.
//
// The target hashes ahead, while the guest still runs at the source, what is unsettled then. When
// the guest stands still this side hashes the same pages, and that is all, but for pages that were
// sent in between: of these the target is asked once everything is confirmed.
#pragma once

#include <cstdint>
#include <future>
#include <optional>
#include <string>
#include <vector>

#include "absl/functional/function_ref.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "predictor/bitmap.h"
#include "predictor/page.h"
#include "transport/memory.h"
#include "transport/sync/page_hash.h"
#include "transport/sync/source_sync.h"
#include "transport/wire/control_channel.h"

namespace presync {

using SendMessage = absl::FunctionRef<absl::Status(const wire::ControlMessage&)>;

// Asks the target for the hash of each of many pages, as many at a time as fit one reply.
class PageHashQuery {
 public:
  PageHashQuery() = default;
  // `pages` ascend. `id` goes with each request, so that its reply is known from others.
  PageHashQuery(std::vector<PageIndex> pages, uint32_t id) : pages_(std::move(pages)), id_(id) {}

  // Sends the next request if none is under way. Errors: `send`'s.
  absl::Status Step(SendMessage send);
  // INVALID_ARGUMENT: it is not what was asked for.
  absl::Status OnReply(const wire::HashReply& reply);
  bool done() const { return !asked_ && asked_end_ == pages_.size(); }

  const std::vector<PageIndex>& pages() const { return pages_; }
  // When done: 16 bytes a page, in the same order.
  const std::string& hashes() const { return hashes_; }

 private:
  std::vector<PageIndex> pages_;
  uint32_t id_ = 0;
  size_t asked_end_ = 0;           // of pages_: asked for so far
  std::optional<HashPlan> asked_;  // until the reply comes
  std::string hashes_;
};

// One thread uses it. The calls come in the order in which they stand here. Before OnStandstill and
// before Differing: Step, again and again, and OnReply for each reply that is ours, until done().
class UnsettledComparison {
 public:
  // Both must outlive it. `id` is for our requests alone. Precondition: sync->NoteWrites() was
  // called just now.
  UnsettledComparison(const GuestMemory* memory, SourceSync* sync, uint32_t id);
  ~UnsettledComparison();

  absl::Status Step(SendMessage send) { return query_.Step(send); }
  absl::Status OnReply(const wire::HashReply& reply) { return query_.OnReply(reply); }
  bool done() const { return query_.done(); }

  // The guest stands still, `pages` are unsettled: hashes here, in threads of its own, what the
  // target has hashed ahead.
  void OnStandstill(PageBitmap pages);
  // Everything is confirmed: asks for the rest.
  void AskForTheRest();
  // And that is there, too: the pages whose copies are not what they should be. Blocks until this
  // side has hashed.
  std::vector<PageRun> Differing();

  PageCount compared() const { return compared_; }

 private:
  const GuestMemory* const memory_;
  SourceSync* const sync_;
  const uint32_t id_;
  PageHashQuery query_;
  std::vector<PageIndex> rest_;
  PageCount compared_ = 0;
  std::future<std::vector<PageRun>> ahead_;
};

}  // namespace presync
