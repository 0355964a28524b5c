#include "transport/sync/source_sync.h"

#include <fcntl.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <functional>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "tests/transport/sync/sync_rig.h"
#include "transport/clock.h"

namespace presync {
namespace {

using Content = SyncRig::Content;
using Rig = SyncRig;

TEST(SourceSync, CopiesAnIdleGuestOnceAndThenIsSilent) {
  Rig rig;
  for (PageIndex page = 0; page < 768; page += 3) rig.source_.Write(page, page + 1);
  rig.Connect(Content::kZero);
  ASSERT_TRUE(rig.Run(absl::Seconds(10), [] {}).ok());
  EXPECT_TRUE(rig.sync_->progress().first_pass_done);
  const uint64_t sent = rig.sync_->progress().pages_sent;
  EXPECT_LE(sent, 256u);
  ASSERT_TRUE(rig.Run(absl::Seconds(10), [] {}).ok());
  EXPECT_EQ(rig.sync_->progress().pages_sent, sent);
  ASSERT_TRUE(rig.Level().ok());
  EXPECT_THAT(rig.Differences(), ::testing::IsEmpty());
}

TEST(SourceSync, ZeroPagesOfAFreshTargetCostNothing) {
  Rig rig;
  rig.Connect(Content::kZero);
  ASSERT_TRUE(rig.Run(absl::Seconds(5), [] {}).ok());
  ASSERT_TRUE(rig.Level().ok());
  EXPECT_EQ(rig.sync_->progress().pages_sent, 0u);
  EXPECT_EQ(rig.sync_->progress().pages_zero, 0u);
}

TEST(SourceSync, ATargetOfUnknownContentIsZeroedWhereTheGuestIsZero) {
  Rig rig;
  for (PageIndex page = 0; page < 768; ++page) rig.target_.Write(page, page + 7);
  rig.Connect(Content::kUnknown);
  ASSERT_TRUE(rig.Level().ok());
  EXPECT_THAT(rig.Differences(), ::testing::IsEmpty());
  EXPECT_EQ(rig.sync_->progress().pages_zero, 768u);
}

TEST(SourceSync, HotPagesAreNotSentAgainAndAgain) {
  Rig rig;
  for (PageIndex page = 0; page < 768; ++page) rig.source_.Write(page, page + 1);
  FakeLinkOptions options;
  options.bytes_per_s =
      100'000'000;  // the set-point is 50 ms of that: 1,220 pages, more than there are
  rig.Connect(Content::kZero, options);
  rig.sync_->set_max_launch_time(absl::Milliseconds(54));  // now 97 pages
  uint64_t n = 0;
  const auto write_hot = [&] {
    for (PageIndex page = 100; page < 132; ++page) rig.source_.Write(page, ++n);
  };
  ASSERT_TRUE(rig.Run(absl::Seconds(5), write_hot).ok());
  ASSERT_TRUE(rig.sync_->progress().first_pass_done);
  const uint64_t sent = rig.sync_->progress().pages_sent;
  ASSERT_TRUE(rig.Run(absl::Seconds(20), write_hot).ok());
  EXPECT_EQ(rig.sync_->progress().pages_sent, sent) << "32 hot pages fit the set-point of 97";
  ASSERT_TRUE(rig.Level().ok());
  EXPECT_THAT(rig.Differences(), ::testing::IsEmpty());
}

TEST(SourceSync, ADiscardedPageBecomesZeroOnTheTarget) {
  Rig rig({64});
  for (PageIndex page = 0; page < 64; ++page) rig.source_.Write(page, page + 1);
  rig.Connect(Content::kZero);
  ASSERT_TRUE(rig.Level().ok());
  // As a balloon does: the page leaves the file, and nothing is reported.
  ASSERT_EQ(::fallocate(rig.source_.memory().regions()[0].fd(),
                        FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 8 * kPageBytes, 4 * kPageBytes),
            0);
  ASSERT_TRUE(rig.Level().ok());
  for (PageIndex page = 8; page < 12; ++page) {
    EXPECT_TRUE(rig.target_.scratch().IsZeroPage(page)) << page;
  }
  auto holes = rig.source_.memory().Holes({0, 64});
  ASSERT_TRUE(holes.ok());
  EXPECT_THAT(*holes, ::testing::ElementsAre(PageRun{8, 4})) << "looking must not allocate";
}

// Neither a hole, nor written: a page that a balloon took, and that the guest read afterwards.
TEST(SourceSync, ADiscardedPageThatWasReadAgainBecomesZeroOnTheTarget) {
  Rig rig({64});
  for (PageIndex page = 0; page < 64; ++page) rig.source_.Write(page, page + 1);
  rig.Connect(Content::kZero);
  ASSERT_TRUE(rig.Level().ok());
  const Region& region = rig.source_.memory().regions()[0];
  for (const PageIndex page : {8, 40}) {
    ASSERT_EQ(::fallocate(region.fd(), FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
                          static_cast<off_t>(page * kPageBytes), kPageBytes),
              0);
    ASSERT_EQ(
        std::to_integer<int>(*const_cast<volatile std::byte*>(region.data() + page * kPageBytes)),
        0);
    rig.now_ += absl::Milliseconds(30);
    ASSERT_TRUE(rig.Level().ok());
    EXPECT_TRUE(rig.target_.scratch().IsZeroPage(page)) << page;
  }
  const uint64_t zeros = rig.sync_->progress().pages_zero;
  EXPECT_EQ(zeros, 2u);
}

TEST(SourceSync, KeepsWhatWasConfirmedOverALostLink) {
  Rig rig;
  for (PageIndex page = 0; page < 768; ++page) rig.source_.Write(page, page + 1);
  rig.Connect(Content::kZero);
  ASSERT_TRUE(rig.Level().ok());
  const uint64_t sent = rig.sync_->progress().pages_sent;
  rig.Disconnect();
  for (PageIndex page = 5; page < 15; ++page) rig.source_.Write(page, 1000 + page);
  rig.Connect(Content::kKept);
  ASSERT_TRUE(rig.Level().ok());
  EXPECT_EQ(rig.sync_->progress().pages_sent, sent + 10);
  EXPECT_THAT(rig.Differences(), ::testing::IsEmpty());
}

// Lets the guest write a page at the last moment before it is armed.
class WriteBeforeArm final : public DirtyLog {
 public:
  WriteBeforeArm(DirtyLog* log, std::function<void(PageIndex)> write)
      : log_(log), write_(std::move(write)) {}
  std::string_view name() const override { return "write-before-arm"; }
  absl::Status Peek(std::vector<PageRun>* written) override { return log_->Peek(written); }
  absl::Status Arm(absl::Span<const PageRun> runs) override {
    for (const PageRun& run : runs) write_(run.first);
    return log_->Arm(runs);
  }

 private:
  DirtyLog* const log_;
  const std::function<void(PageIndex)> write_;
};

// Invariant "arm before read": what is written just before arming is never reported, so it must be
// in the bytes that are read afterwards. A sync that read first would take the page for zero.
TEST(SourceSync, APageIsArmedBeforeItsBytesAreRead) {
  ModelMemory source({64}), target({64});
  auto exact = source.MakeLog();
  bool written = false;
  WriteBeforeArm log(exact.get(), [&](PageIndex page) {
    if (page == 0 && !written) source.Write(page, 77);
    written |= page == 0;
  });
  auto sync = SourceSync::Create(&source.memory(), &log, SourceSyncOptions());
  ASSERT_TRUE(sync.ok());
  auto link = FakeLink::Create(&source.memory(), &target.memory(), FakeLinkOptions());
  ASSERT_TRUE(link.ok());
  (*sync)->AttachLink(link->source.get(), Content::kZero);
  ASSERT_TRUE((*sync)->Flush(MonotonicNow() + absl::Seconds(20)).ok());
  ASSERT_TRUE(written);
  EXPECT_THAT(source.scratch().Differences(target.scratch()), ::testing::IsEmpty());
  (*sync)->DetachLink();
}

TEST(SourceSync, GoesOnOverAnotherLinkOnceQuiet) {
  Rig rig;
  std::mt19937_64 random(5);
  const auto write = [&] { rig.source_.Write(static_cast<PageIndex>(random() % 768), random()); };
  rig.Connect(Content::kZero);
  ASSERT_TRUE(rig.Run(absl::Milliseconds(300), write).ok());
  rig.sync_->set_held(true);
  for (int i = 0; i < 1000 && !rig.sync_->quiet(); ++i) {
    ASSERT_TRUE(rig.Run(absl::Milliseconds(1), write).ok());
  }
  ASSERT_TRUE(rig.sync_->quiet());
  // Held: the guest goes on writing, and nothing is sent.
  const uint64_t sent = rig.sync_->progress().pages_sent;
  const uint64_t wire = rig.sync_->progress().wire_bytes;
  ASSERT_TRUE(rig.Run(absl::Milliseconds(300), write).ok());
  EXPECT_EQ(rig.sync_->progress().pages_sent, sent);
  EXPECT_TRUE(rig.sync_->quiet());

  FakeLink old = std::move(rig.link_);
  FakeLinkOptions options;
  options.seed = 2;
  options.now = [&] { return rig.now_; };
  options.wait_until = [&](absl::Time until) { rig.now_ = std::max(rig.now_, until); };
  auto next = FakeLink::Create(&rig.source_.memory(), &rig.target_.memory(), options);
  ASSERT_TRUE(next.ok());
  rig.link_ = *std::move(next);
  const PageCount residual = rig.sync_->residual();
  rig.sync_->SwitchLink(rig.link_.source.get());
  EXPECT_EQ(rig.sync_->residual(), residual) << "nothing became stale";
  old = {};
  EXPECT_GE(rig.sync_->progress().wire_bytes, wire);
  ASSERT_TRUE(rig.Run(absl::Milliseconds(300), write).ok());
  ASSERT_TRUE(rig.Level().ok());
  EXPECT_THAT(rig.Differences(), ::testing::IsEmpty());
}

TEST(SourceSyncDeathTest, SwitchingLinksInTheMiddleOfAWriteIsABrokenInvariant) {
  Rig rig;
  for (PageIndex page = 0; page < 768; ++page) rig.source_.Write(page, page + 1);
  rig.Connect(Content::kZero);
  ASSERT_TRUE(rig.sync_->PushAll().ok());
  ASSERT_FALSE(rig.sync_->quiet());
  EXPECT_DEATH(rig.sync_->SwitchLink(rig.link_.source.get()), "quiet");
}

// A link whose device counts congestion notifications.
class MarkedLink final : public SourceLink {
 public:
  explicit MarkedLink(SourceLink* link) : link_(link) {}
  std::string_view name() const override { return link_->name(); }
  absl::StatusOr<size_t> Post(absl::Span<const PageWrite> writes) override {
    return link_->Post(writes);
  }
  absl::StatusOr<CommitId> PostCommit() override { return link_->PostCommit(); }
  absl::Status Poll(LinkEvents* events) override { return link_->Poll(events); }
  absl::Status Wait(absl::Time deadline) override { return link_->Wait(deadline); }
  LinkStats stats() const override {
    LinkStats stats = link_->stats();
    stats.congestion_marks = marks;
    return stats;
  }
  void SetPacing(uint64_t bytes_per_s) override { link_->SetPacing(bytes_per_s); }
  uint64_t marks = 1000;  // from before this link was used

 private:
  SourceLink* const link_;
};

TEST(SourceSync, CongestionMarksSlowItDown) {
  Rig rig({16384});
  for (PageIndex page = 0; page < 16384; ++page) rig.source_.Write(page, page + 1);
  rig.Connect(Content::kZero);
  MarkedLink marked(rig.link_.source.get());
  rig.sync_->DetachLink();
  rig.sync_->AttachLink(&marked, Content::kZero);
  ASSERT_TRUE(rig.Run(absl::Milliseconds(550), [] {}).ok());
  const SyncProgress progress = rig.sync_->progress();
  const uint64_t before = progress.allowed_bytes_per_s;
  ASSERT_GT(before, progress.link_bytes_per_s / 20) << "below that pressure does not slow it";
  ASSERT_TRUE(rig.Run(absl::Milliseconds(250), [&] { ++marked.marks; }).ok());
  EXPECT_LT(rig.sync_->progress().allowed_bytes_per_s, before);
  rig.sync_->DetachLink();
}

// Pages without payload take nothing of the link, so its pace is not theirs.
TEST(SourceSync, AGuestOfHolesIsThroughAtOnceHoweverSlowThePace) {
  Rig rig({16384});
  for (PageIndex page = 0; page < 16384; page += 1000) rig.source_.Write(page, page + 1);
  rig.Connect(Content::kZero);
  MarkedLink marked(rig.link_.source.get());
  rig.sync_->DetachLink();
  rig.sync_->AttachLink(&marked, Content::kZero);
  ASSERT_TRUE(rig.Run(absl::Seconds(2), [&] { ++marked.marks; }).ok());
  EXPECT_TRUE(rig.sync_->progress().first_pass_done);
  EXPECT_LE(rig.sync_->progress().residual, rig.sync_->progress().set_point);
  ASSERT_TRUE(rig.Level().ok());
  EXPECT_THAT(rig.Differences(), ::testing::IsEmpty());
  rig.sync_->DetachLink();
}

// A link that is under pressure now and then is measured again and again: by what has to be sent.
TEST(SourceSync, WhatTheSetPointHasRoomForIsNotSentToMeasureTheRate) {
  Rig rig({2048});
  for (PageIndex page = 0; page < 2048; ++page) rig.source_.Write(page, page + 1);
  FakeLinkOptions options;
  options.bytes_per_s = 100'000'000;  // the set-point is 50 ms of that: 1,220 pages
  rig.Connect(Content::kZero, options);
  MarkedLink marked(rig.link_.source.get());
  rig.sync_->DetachLink();
  rig.sync_->AttachLink(&marked, Content::kZero);
  ASSERT_TRUE(rig.Run(absl::Seconds(5), [] {}).ok());
  ASSERT_TRUE(rig.sync_->progress().first_pass_done);
  ASSERT_TRUE(rig.Level().ok());  // nothing is left but what is written from now on
  const uint64_t sent = rig.sync_->progress().pages_sent;
  for (int second = 0; second < 10; ++second) {
    ++marked.marks;
    for (PageIndex page = 0; page < 100; ++page) rig.source_.Write(page, 5000 * second + page);
    ASSERT_TRUE(rig.Run(absl::Seconds(1), [] {}).ok());
    ASSERT_LT(rig.sync_->progress().residual, rig.sync_->progress().set_point);
  }
  EXPECT_EQ(rig.sync_->progress().pages_sent, sent);
  ASSERT_TRUE(rig.Level().ok());
  EXPECT_THAT(rig.Differences(), ::testing::IsEmpty());
  rig.sync_->DetachLink();
}

TEST(SourceSync, AnUnknownPolicyIsRefused) {
  ModelMemory memory({4});
  auto log = memory.MakeLog();
  SourceSyncOptions options;
  options.policy = "magic";
  EXPECT_EQ(SourceSync::Create(&memory.memory(), log.get(), options).status().code(),
            absl::StatusCode::kInvalidArgument);
}

TEST(SourceSync, ADeadGuestIsSaidToBeGone) {
  Rig rig;
  rig.Connect(Content::kZero);
  rig.source_.Die();
  EXPECT_EQ(rig.Run(absl::Seconds(1), [] {}).code(), absl::StatusCode::kUnavailable);
}

// The test that matters most: whatever the guest writes and wherever the link breaks, source equals
// target in the end, byte for byte.
class RandomFaults : public ::testing::TestWithParam<uint64_t> {};

TEST_P(RandomFaults, SourceEqualsTargetInTheEnd) {
  const uint64_t seed = GetParam();
  SCOPED_TRACE(testing::Message() << "seed " << seed);
  std::mt19937_64 random(seed);
  Rig rig({300, 17, 195}, seed % 3 == 0 ? "oldest" : "ewma");
  const auto write = [&] {
    for (int i = 0; i < 6; ++i) {
      const bool hot = random() % 4 != 0;
      const PageIndex page = static_cast<PageIndex>(hot ? random() % 40 : random() % 512);
      rig.source_.Write(page, random() % 8 == 0 ? 0 : random() | 1);
    }
    if (random() % 64 == 0) {
      ::fallocate(rig.source_.memory().regions()[0].fd(),
                  FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
                  static_cast<off_t>((random() % 290) * kPageBytes), 3 * kPageBytes);
    }
  };
  Content content = Content::kZero;
  for (int life = 0; life < 6; ++life) {
    FakeLinkOptions options;
    options.seed = random();
    options.bytes_per_s = 20'000'000;
    options.jitter = absl::Microseconds(random() % 5000);
    options.short_post_probability = 0.2;
    if (random() % 2 == 0) options.faults.drop_after_writes = 1 + random() % 300;
    if (random() % 4 == 0) options.faults.fail_commit = 1 + random() % 5;
    if (random() % 4 == 0) options.faults.fail_poll = 1 + random() % 2000;
    rig.Connect(content, options);
    const absl::Status status = rig.Run(absl::Milliseconds(200 + random() % 1500), write);
    content = Content::kKept;
    if (!status.ok()) {
      ASSERT_EQ(status.code(), absl::StatusCode::kUnavailable) << status;
    }
    rig.Disconnect();
    for (int i = 0; i < 20; ++i) write();
  }
  FakeLinkOptions whole;
  whole.seed = random();
  rig.Connect(content, whole);
  ASSERT_TRUE(rig.Run(absl::Milliseconds(500), write).ok());
  ASSERT_TRUE(rig.Level().ok());
  EXPECT_THAT(rig.Differences(), ::testing::IsEmpty());
}

INSTANTIATE_TEST_SUITE_P(Seeds, RandomFaults, ::testing::Range<uint64_t>(1, 60));

}  // namespace
}  // namespace presync
