// A link inside one process, for tests: the bytes are really copied, as late and in as mixed an
// order as the contract of transport/link.h allows, and faults come where a script wants them.
//
// Nothing happens by itself: there is no thread, and time is what the caller's function says. The
// link moves on in every call that is made to either end. The same seed, calls and times give the
// same copies, completions and faults.
//
// What it does to each page of a write, on purpose:
// - reads the source's bytes at a moment of its own between post and completion;
// - writes them to the target's memory between that moment and the confirmation of a later commit,
//   often only then. So whoever trusts a completion, or an unconfirmed commit, finds old bytes.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>

#include "absl/time/time.h"
#include "transport/link.h"
#include "transport/memory.h"

namespace presync {

// Where the script breaks the link. Numbers count from 1; the call with that number fails with
// UNAVAILABLE, and the link is gone from then on.
struct FakeLinkFaults {
  std::optional<uint64_t> fail_post;
  std::optional<uint64_t> fail_poll;
  std::optional<uint64_t> fail_commit;  // call of PostCommit
  // The link dies as soon as this many writes were accepted. What was in flight arrives in part:
  // some of its pages, in any order, as a dying network leaves it.
  std::optional<uint64_t> drop_after_writes;
};

struct FakeLinkOptions {
  uint64_t seed = 1;
  FakeLinkFaults faults;

  // The clock, and how Wait lets it pass: returns when it reads at least the given time, or
  // earlier. Unset: the real clock.
  std::function<absl::Time()> now;
  std::function<void(absl::Time)> wait_until;

  absl::Duration latency = absl::Microseconds(50);  // from leaving the source to completion; a
                                                    // commit takes as long again
  absl::Duration jitter = absl::Microseconds(50);   // each delay grows by 0 to this much
  uint64_t bytes_per_s = 0;                         // of the wire; 0 = no limit

  uint64_t max_in_flight_bytes = uint64_t{4}
                                 << 20;  // then Post starts nothing; one write always fits
  size_t max_commits = 16;
  double short_post_probability = 0;  // how often Post starts fewer writes than it could, even none
};

class FakeWire;

class FakeSourceLink final : public SourceLink {
 public:
  explicit FakeSourceLink(std::shared_ptr<FakeWire> wire);
  ~FakeSourceLink() override;

  std::string_view name() const override { return "fake"; }
  // Besides the contract: INTERNAL when a page is posted that has not completed (the caller's bug).
  absl::StatusOr<size_t> Post(absl::Span<const PageWrite> writes) override;
  absl::StatusOr<CommitId> PostCommit() override;
  absl::Status Poll(LinkEvents* events) override;
  absl::Status Wait(absl::Time deadline) override;
  LinkStats stats() const override;
  void SetPacing(uint64_t bytes_per_s) override;

 private:
  const std::shared_ptr<FakeWire> wire_;
};

class FakeTargetLink final : public TargetLink {
 public:
  explicit FakeTargetLink(std::shared_ptr<FakeWire> wire);
  ~FakeTargetLink() override;

  std::string_view name() const override { return "fake"; }
  absl::Status health() const override;
  void Close() override;

 private:
  const std::shared_ptr<FakeWire> wire_;
};

// Both ends. They may be used from different threads, and destroyed in any order.
struct FakeLink {
  std::unique_ptr<FakeSourceLink> source;
  std::unique_ptr<FakeTargetLink> target;

  // The memories must outlive both ends, and have the same number of pages.
  // INVALID_ARGUMENT: they have not.
  static absl::StatusOr<FakeLink> Create(const GuestMemory* source_memory,
                                         const GuestMemory* target_memory, FakeLinkOptions options);
};

}  // namespace presync
