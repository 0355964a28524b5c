// What transport/link.h promises, as one suite for every link: include this, and instantiate
// LinkContract with the ways to connect one. It sees links only through their interfaces.
#pragma once

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/time/clock.h"
#include "tests/transport/scratch_memory.h"
#include "transport/clock.h"
#include "transport/link.h"

namespace presync {

struct LinkPair {
  std::unique_ptr<SourceLink> source;
  std::unique_ptr<TargetLink> target;
  std::function<absl::Time()> now = MonotonicNow;  // the clock of its deadlines
};

struct LinkKind {
  std::string name;
  // Both ends, connected, over memories of the same shape. At most 1 MiB may be queued in it, so
  // that back-pressure is seen.
  std::function<absl::StatusOr<LinkPair>(const GuestMemory& source, const GuestMemory& target)>
      connect;
  bool fills_holes = false;  // making it gives memory to all holes, as pinning does
};

inline void PrintTo(const LinkKind& kind, std::ostream* out) { *out << kind.name; }

class LinkContract : public ::testing::TestWithParam<LinkKind> {
 protected:
  // Long enough for any machine: reaching it is a failure, never a measure.
  static constexpr absl::Duration kPatience = absl::Seconds(60);

  void SetUp() override {
    // More than one region, a region of one page, and more pages than any queue takes at once.
    source_ram_ = Scratch();
    target_ram_ = Scratch();
    ASSERT_TRUE(source_ram_ && target_ram_);
    auto pair = GetParam().connect(source_ram_->memory(), target_ram_->memory());
    ASSERT_TRUE(pair.ok()) << pair.status();
    link_ = *std::move(pair);
  }

  static std::unique_ptr<ScratchMemory> Scratch() {
    auto scratch = ScratchMemory::Create({700, 1, 2500});
    EXPECT_TRUE(scratch.ok()) << scratch.status();
    return scratch.ok() ? *std::move(scratch) : nullptr;
  }

  PageCount pages() const { return source_ram_->memory().pages(); }
  std::vector<PageWrite> EveryPage(PageCount run_pages, bool zero = false) const {
    std::vector<PageWrite> writes;
    for (const PageRun region : source_ram_->memory().SplitAtRegions({0, pages()})) {
      for (PageIndex first = region.first; first < region.end(); first += run_pages) {
        writes.push_back({{first, std::min(run_pages, region.end() - first)}, zero});
      }
    }
    return writes;
  }

  absl::Status Poll() { return link_.source->Poll(&events_); }

  // Waits for `done` to hold after a Poll. DEADLINE_EXCEEDED when patience ends.
  absl::Status Until(const std::function<bool()>& done) {
    const absl::Time deadline = link_.now() + kPatience;
    while (true) {
      if (auto status = Poll(); !status.ok()) return status;
      if (done()) return absl::OkStatus();
      if (link_.now() >= deadline) return absl::DeadlineExceededError("the test's patience ended");
      if (auto status = link_.source->Wait(deadline); !status.ok()) return status;
    }
  }

  absl::Status PostAll(absl::Span<const PageWrite> writes) {
    while (!writes.empty()) {
      auto posted = link_.source->Post(writes);
      if (!posted.ok()) return posted.status();
      writes.remove_prefix(*posted);
      posted_ += *posted;
      if (*posted > 0) continue;
      const size_t before = events_.completed.size();
      bool waited = false;  // a link may refuse once and take the same later
      auto room = [&] { return events_.completed.size() > before || std::exchange(waited, true); };
      if (auto status = Until(room); !status.ok()) return status;
    }
    return absl::OkStatus();
  }

  absl::Status Commit() {
    auto id = link_.source->PostCommit();
    while (absl::IsResourceExhausted(id.status())) {
      const CommitId before = events_.committed;
      auto room = [&] { return events_.committed > before; };
      if (auto status = Until(room); !status.ok()) return status;
      id = link_.source->PostCommit();
    }
    if (!id.ok()) return id.status();
    return Until([&] { return events_.committed >= *id; });
  }

  // Posts one page after the other until the link says why it no longer works.
  absl::Status RunUntilItFails() {
    const absl::Time deadline = link_.now() + kPatience;
    while (link_.now() < deadline) {
      auto all_completed = [&] { return events_.completed.size() == posted_; };
      if (auto status = Until(all_completed); !status.ok()) return status;
      if (auto status = PostAll(std::vector<PageWrite>{{{700, 1}}}); !status.ok()) return status;
    }
    return absl::DeadlineExceededError("the link still works");
  }

  std::unique_ptr<ScratchMemory> source_ram_, target_ram_;
  LinkPair link_;  // after the memories: it ends before them
  LinkEvents events_;
  size_t posted_ = 0;  // writes, by PostAll
};

TEST_P(LinkContract, CompletesEachWriteExactlyOnce) {
  for (PageIndex page = 0; page < pages(); ++page) source_ram_->FillPage(page, 1);
  const std::vector<PageWrite> writes = EveryPage(3);
  ASSERT_TRUE(PostAll(writes).ok());
  ASSERT_TRUE(Commit().ok());
  EXPECT_THAT(events_.completed, ::testing::UnorderedElementsAreArray(writes));
  ASSERT_TRUE(Commit().ok());
  EXPECT_EQ(events_.completed.size(), writes.size());
}

TEST_P(LinkContract, ConfirmedMeansThatTheTargetHoldsIt) {
  for (const PageCount run_pages : {1u, 7u, 64u, 513u, 2500u}) {
    SCOPED_TRACE(run_pages);
    for (PageIndex page = 0; page < pages(); ++page) source_ram_->FillPage(page, run_pages);
    ASSERT_TRUE(PostAll(EveryPage(run_pages)).ok());
    ASSERT_TRUE(Commit().ok());
    EXPECT_THAT(source_ram_->Differences(*target_ram_), ::testing::IsEmpty());
  }
}

TEST_P(LinkContract, ZeroRunsMakeTheTargetZero) {
  for (PageIndex page = 0; page < pages(); ++page) target_ram_->FillPage(page, 1);
  ASSERT_TRUE(PostAll(std::vector<PageWrite>{{{699, 1}, true}, {{701, 2499}, true}}).ok());
  ASSERT_TRUE(Commit().ok());
  for (PageIndex page = 0; page < pages(); ++page) {
    const bool written = page == 699 || (page >= 701 && page < 3200);
    ASSERT_EQ(target_ram_->IsZeroPage(page), written) << page;
  }
}

TEST_P(LinkContract, ZeroRunsLeaveTheTargetsHolesAndTheSourceAlone) {
  // A link that registers memory has filled its holes when it was made.
  const auto before = source_ram_->memory().Holes({0, pages()});
  const auto target_before = target_ram_->memory().Holes({0, pages()});
  ASSERT_TRUE(before.ok() && target_before.ok());
  ASSERT_TRUE(PostAll(EveryPage(512, true)).ok());
  ASSERT_TRUE(Commit().ok());
  EXPECT_EQ(*source_ram_->memory().Holes({0, pages()}), *before);
  EXPECT_EQ(*target_ram_->memory().Holes({0, pages()}), *target_before);
  if (GetParam().fills_holes) return;
  EXPECT_THAT(*before,
              ::testing::ElementsAre(PageRun{0, 700}, PageRun{700, 1}, PageRun{701, 2500}));
}

TEST_P(LinkContract, PushesBackAndTakesMoreLater) {
  for (PageIndex page = 0; page < pages(); ++page) source_ram_->FillPage(page, 1);
  const std::vector<PageWrite> writes = EveryPage(1);  // 12 MiB, more than it may queue
  auto posted = link_.source->Post(writes);
  ASSERT_TRUE(posted.ok()) << posted.status();
  EXPECT_LT(*posted, writes.size());
  ASSERT_TRUE(PostAll(absl::MakeConstSpan(writes).subspan(*posted)).ok());
  ASSERT_TRUE(Commit().ok());
  EXPECT_THAT(source_ram_->Differences(*target_ram_), ::testing::IsEmpty());
}

TEST_P(LinkContract, TakesAWriteLargerThanItsQueueWhenIdle) {
  for (PageIndex page = 701; page < pages(); ++page) source_ram_->FillPage(page, 1);
  ASSERT_TRUE(PostAll(std::vector<PageWrite>{{{701, 2500}}}).ok());
  ASSERT_TRUE(Commit().ok());
  EXPECT_THAT(source_ram_->Differences(*target_ram_), ::testing::IsEmpty());
}

TEST_P(LinkContract, PostsNothingOfAnEmptyList) {
  auto posted = link_.source->Post({});
  ASSERT_TRUE(posted.ok());
  EXPECT_EQ(*posted, 0u);
}

TEST_P(LinkContract, RefusesRunsThatAreNotWithinOneRegion) {
  for (const PageRun run : {PageRun{5, 0}, PageRun{699, 2}, PageRun{700, 2}, PageRun{3200, 2},
                            PageRun{3201, 1}, PageRun{0, UINT32_MAX}, PageRun{701, UINT32_MAX}}) {
    for (const bool zero : {false, true}) {
      EXPECT_EQ(link_.source->Post(std::vector<PageWrite>{{run, zero}}).status().code(),
                absl::StatusCode::kInvalidArgument)
          << run.first << "+" << run.count;
    }
  }
  // The good prefix before a bad run is started, and the link goes on.
  source_ram_->FillPage(3, 1);
  size_t posted = 0;
  ASSERT_TRUE(Until([&] {
                posted = *link_.source->Post(std::vector<PageWrite>{{{3, 1}}, {{699, 2}}});
                return posted > 0;
              }).ok());
  EXPECT_EQ(posted, 1u);
  ASSERT_TRUE(Commit().ok());
  EXPECT_THAT(source_ram_->Differences(*target_ram_), ::testing::IsEmpty());
}

TEST_P(LinkContract, ThePostAfterTheLastChangeWins) {
  std::atomic<bool> stop = false;
  std::thread guest([&] {
    for (uint64_t value = 1; !stop; ++value) {
      for (PageIndex page = 0; page < 200; ++page) source_ram_->FillPage(page, value);
    }
  });
  const std::vector<PageWrite> writes = {{{0, 64}}, {{64, 1}}, {{65, 100}}, {{165, 35}}};
  absl::Status status;
  for (int round = 0; round < 20 && status.ok(); ++round) {
    status = PostAll(writes);
    const size_t all = (round + 1) * writes.size();
    if (status.ok()) status = Until([&] { return events_.completed.size() >= all; });
  }
  stop = true;
  guest.join();
  ASSERT_TRUE(status.ok()) << status;
  ASSERT_TRUE(PostAll(writes).ok());
  ASSERT_TRUE(Commit().ok());
  EXPECT_THAT(source_ram_->Differences(*target_ram_), ::testing::IsEmpty());
}

TEST_P(LinkContract, NumbersCommitsAndKeepsSixteenUnderWay) {
  std::vector<CommitId> ids;
  for (PageIndex page = 0; page < 16; ++page) {
    source_ram_->FillPage(page, 5);
    ASSERT_TRUE(PostAll(std::vector<PageWrite>{{{page, 1}}}).ok());
    auto id = link_.source->PostCommit();
    ASSERT_TRUE(id.ok()) << id.status();
    ids.push_back(*id);
  }
  for (size_t i = 0; i < ids.size(); ++i) EXPECT_EQ(ids[i], i + 1);
  CommitId last = 0;
  ASSERT_TRUE(Until([&] {
                EXPECT_GE(events_.committed, last);
                last = events_.committed;
                for (PageIndex page = 0; page < last; ++page) {
                  EXPECT_TRUE(source_ram_->PageEquals(page, *target_ram_)) << page;
                }
                return last == 16;
              }).ok());
}

TEST_P(LinkContract, RefusesTooManyCommitsAndRecovers) {
  absl::Status status;
  CommitId last = 0;
  for (int i = 0; i < 100000 && status.ok(); ++i) {
    auto id = link_.source->PostCommit();
    status = id.status();
    if (id.ok()) last = *id;
  }
  if (!status.ok()) {
    EXPECT_EQ(status.code(), absl::StatusCode::kResourceExhausted);
    EXPECT_GE(last, 16u);
  }
  ASSERT_TRUE(Until([&] { return events_.committed == last; }).ok());
  ASSERT_TRUE(Commit().ok());
}

TEST_P(LinkContract, WaitReturnsAtItsDeadline) {
  const absl::Time deadline = link_.now() + absl::Milliseconds(20);
  ASSERT_TRUE(link_.source->Wait(deadline).ok());
  EXPECT_GE(link_.now(), deadline);
  const absl::Time before = link_.now();
  ASSERT_TRUE(link_.source->Wait(absl::InfinitePast()).ok());
  EXPECT_LT(link_.now() - before, kPatience);
}

TEST_P(LinkContract, CountsWhatItCarries) {
  source_ram_->FillPage(0, 1);
  ASSERT_TRUE(PostAll(std::vector<PageWrite>{{{0, 2}}, {{2, 3}, true}}).ok());
  ASSERT_TRUE(Commit().ok());
  const LinkStats stats = link_.source->stats();
  EXPECT_EQ(stats.payload_bytes, 2 * kPageBytes);
  EXPECT_EQ(stats.zero_bytes, 3 * kPageBytes);
  EXPECT_EQ(stats.queued_bytes, 0u);
  EXPECT_GE(stats.wire_bytes, kPageBytes);  // the page that does not compress
  EXPECT_GT(stats.completion_latency, absl::ZeroDuration());
}

TEST_P(LinkContract, ASourceWhoseTargetIsGoneSaysSoAndConfirmsNothingMore) {
  source_ram_->FillPage(0, 1);
  ASSERT_TRUE(PostAll(std::vector<PageWrite>{{{0, 1}}}).ok());
  ASSERT_TRUE(Commit().ok());
  link_.target.reset();
  const auto id = link_.source->PostCommit();
  const absl::Status status = RunUntilItFails();
  EXPECT_EQ(status.code(), absl::StatusCode::kUnavailable) << status;
  EXPECT_EQ(Poll().code(), absl::StatusCode::kUnavailable);
  EXPECT_EQ(events_.committed, 1u) << id.status();
  EXPECT_EQ(link_.source->PostCommit().status().code(), absl::StatusCode::kUnavailable);
  EXPECT_EQ(link_.source->Post(std::vector<PageWrite>{{{1, 1}}}).status().code(),
            absl::StatusCode::kUnavailable);
  EXPECT_TRUE(link_.source->Wait(absl::InfiniteFuture()).ok());
}

TEST_P(LinkContract, ATargetWhoseSourceIsGoneSaysSo) {
  EXPECT_TRUE(link_.target->health().ok()) << link_.target->health();
  ASSERT_TRUE(PostAll(EveryPage(700)).ok());
  link_.source.reset();
  const absl::Time deadline = MonotonicNow() + kPatience;
  while (link_.target->health().ok() && MonotonicNow() < deadline)
    absl::SleepFor(absl::Milliseconds(1));
  EXPECT_EQ(link_.target->health().code(), absl::StatusCode::kUnavailable);
  link_.target->Close();
  EXPECT_EQ(link_.target->health().code(), absl::StatusCode::kUnavailable);
}

TEST_P(LinkContract, NothingIsWrittenOnceCloseHasReturned) {
  for (PageIndex page = 0; page < pages(); ++page) source_ram_->FillPage(page, 1);
  ASSERT_TRUE(PostAll(EveryPage(5)).ok());  // what its queues take is still on its way now
  link_.target->Close();
  EXPECT_EQ(link_.target->health().code(), absl::StatusCode::kCancelled);
  // The target guest runs now, and what it writes stays.
  for (PageIndex page = 0; page < pages(); ++page) target_ram_->FillPage(page, 2);
  const absl::Status status = RunUntilItFails();
  EXPECT_EQ(status.code(), absl::StatusCode::kUnavailable) << status;
  link_.target->Close();
  link_ = {};
  auto expected = Scratch();
  for (PageIndex page = 0; page < pages(); ++page) expected->FillPage(page, 2);
  EXPECT_THAT(target_ram_->Differences(*expected), ::testing::IsEmpty());
}

// Random writes of a guest, random posts, random commits: whatever is confirmed and has not changed
// since must be equal, at each confirmation and, byte for byte, at the end.
TEST_P(LinkContract, RandomWritesAndCommits) {
  const uint64_t seed = std::random_device()();
  SCOPED_TRACE(::testing::Message() << "seed " << seed);
  std::mt19937_64 random(seed);
  auto below = [&](uint64_t limit) { return static_cast<PageCount>(random() % limit); };

  enum State : uint8_t { kStale, kPosted, kSent };  // kSent: posted and not changed since
  std::vector<State> state(pages(), kSent);
  std::vector<uint8_t> in_flight(pages(), 0);
  std::vector<CommitId> covered_by(pages(), 0);
  CommitId next_commit = 1;
  CommitId seen = 0;
  size_t taken = 0;

  auto poll = [&] {
    if (auto status = Poll(); !status.ok()) return status;
    for (; taken < events_.completed.size(); ++taken) {
      const PageRun run = events_.completed[taken].run;
      for (PageIndex page = run.first; page < run.end(); ++page) in_flight[page] = 0;
    }
    if (events_.committed == seen) return absl::OkStatus();
    seen = events_.committed;
    for (PageIndex page = 0; page < pages(); ++page) {
      if (state[page] == kSent && covered_by[page] <= seen) {
        EXPECT_TRUE(source_ram_->PageEquals(page, *target_ram_)) << "page " << page;
      }
    }
    return absl::OkStatus();
  };

  for (int step = 0; step < 3000; ++step) {
    for (PageCount i = below(6); i > 0; --i) {
      const PageIndex page = below(4) == 0 ? below(40) : below(pages());  // some pages are hot
      below(5) == 0 ? source_ram_->ZeroPage(page) : source_ram_->FillPage(page, random());
      state[page] = kStale;
    }
    const PageIndex first = below(pages());
    PageRun run{first, 0};
    while (run.end() < pages() && run.count < 80 && in_flight[run.end()] == 0 &&
           source_ram_->memory().IsWithinOneRegion({first, run.count + 1})) {
      ++run.count;
    }
    if (run.count > 0) run.count = 1 + below(run.count);
    const bool zero = run.count == 1 && source_ram_->IsZeroPage(first);
    if (run.count > 0) {
      auto posted = link_.source->Post(std::vector<PageWrite>{{run, zero}});
      ASSERT_TRUE(posted.ok()) << posted.status();
      for (PageIndex page = run.first; *posted == 1 && page < run.end(); ++page) {
        state[page] = kSent;
        in_flight[page] = 1;
        covered_by[page] = next_commit;
      }
    }
    if (below(20) == 0) {
      auto id = link_.source->PostCommit();
      if (id.ok()) next_commit = *id + 1;
    }
    if (below(10) == 0) {
      ASSERT_TRUE(link_.source->Wait(link_.now() + absl::Milliseconds(1)).ok());
    }
    ASSERT_TRUE(poll().ok());
    if (HasFailure()) return;
  }
  ASSERT_TRUE(Commit().ok());
  ASSERT_TRUE(poll().ok());
  for (PageIndex page = 0; page < pages(); ++page) {
    if (state[page] == kSent) continue;
    ASSERT_TRUE(PostAll(std::vector<PageWrite>{{{page, 1}}}).ok());
  }
  ASSERT_TRUE(Commit().ok());
  EXPECT_THAT(source_ram_->Differences(*target_ram_), ::testing::IsEmpty());
}

}  // namespace presync
