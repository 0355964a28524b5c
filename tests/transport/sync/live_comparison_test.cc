// Comparing while the guest runs: what differs is found and mended, what is only being written is
// never taken for a difference, and nothing is taken for equal that is not. In virtual time, over a
// link that delivers as late as its contract allows.
#include "transport/sync/live_comparison.h"

#include <fcntl.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <memory>
#include <optional>
#include <random>
#include <vector>

#include "tests/transport/sync/sync_rig.h"

namespace presync {
namespace {

using ::testing::ElementsAre;
using ::testing::IsEmpty;
using Content = SyncRig::Content;
using Goal = LiveComparison::Goal;

constexpr PageCount kPages = 768;

HashPlan PlanOf(const wire::HashRequest& request) {
  return {.run = {request.first_page(), request.pages()},
          .pages_per_hash = request.pages_per_hash(),
          .only = {request.only().begin(), request.only().end()}};
}

// A comparison whose target hashes, and whose answer comes, whenever the test says.
class Comparing {
 public:
  Comparing(SyncRig* rig, Goal goal, PageCount piece_pages = 100)
      : rig_(rig),
        comparison_(&rig->source_.memory(), rig->sync_.get(), goal, {0, kPages}, piece_pages,
                    &last_id_) {}

  absl::Status Step() {
    return comparison_.Step([this](const wire::ControlMessage& message) {
      EXPECT_FALSE(asked_ || answer_) << "one request at a time";
      asked_ = message.hash_request();
      return absl::OkStatus();
    });
  }
  void TargetHashes() {
    if (!asked_) return;
    wire::HashReply reply;
    const absl::StatusOr<std::string> hashes = HashPages(rig_->target_.memory(), PlanOf(*asked_));
    ASSERT_TRUE(hashes.ok()) << hashes.status();
    reply.set_id(asked_->id());
    reply.set_first_page(asked_->first_page());
    reply.set_hashes(*hashes);
    asked_.reset();
    answer_ = std::move(reply);
  }
  void AnswerComes() {
    if (!answer_) return;
    ASSERT_TRUE(comparison_.OnReply(*std::exchange(answer_, std::nullopt)).ok());
  }

  // Runs it to its end, with `between` between any two steps.
  template <typename Between>
  ComparisonReport Run(Between between) {
    for (int i = 0; i < 100'000 && !comparison_.done(); ++i) {
      EXPECT_TRUE(Step().ok());
      between();
      TargetHashes();
      between();
      AnswerComes();
      EXPECT_TRUE(rig_->sync_->Tick().ok());
      rig_->now_ += absl::Milliseconds(1);
    }
    EXPECT_TRUE(comparison_.done());
    return comparison_.report();
  }

  LiveComparison& comparison() { return comparison_; }
  const std::optional<wire::HashRequest>& asked() const { return asked_; }

 private:
  SyncRig* const rig_;
  uint32_t last_id_ = 0;
  LiveComparison comparison_;
  std::optional<wire::HashRequest> asked_;
  std::optional<wire::HashReply> answer_;
};

// In sync, two pages in three of them zero.
class LiveComparisonTest : public ::testing::Test {
 protected:
  LiveComparisonTest() {
    for (PageIndex page = 0; page < kPages; page += 3) rig_.source_.Write(page, page + 1);
    rig_.Connect(Content::kZero);
    EXPECT_TRUE(rig_.Level().ok());
  }
  SyncRig rig_;
};

TEST_F(LiveComparisonTest, AnIdleGuestsCopyIsEqual) {
  const ComparisonReport report = Comparing(&rig_, Goal::kVerify).Run([] {});
  EXPECT_EQ(report.compared, kPages);
  EXPECT_EQ(report.aside, 0u);
  EXPECT_EQ(report.differing, 0u);
  EXPECT_LT(report.hash_bytes, kPages * 3u) << "a hash for 16 pages";
}

TEST_F(LiveComparisonTest, SpoiledPagesAreFoundNamedAndMended) {
  for (const PageIndex page : {5u, 99u, 100u, 511u, 512u, 767u}) {  // 5 and 100 are zero here
    rig_.target_.scratch().FillPage(page, 4711);
  }
  rig_.target_.scratch().ZeroPage(300);
  const ComparisonReport report = Comparing(&rig_, Goal::kVerify).Run([] {});
  EXPECT_THAT(report.named, ElementsAre(5, 99, 100, 300, 511, 512, 767));
  EXPECT_EQ(report.differing, 7u);
  EXPECT_EQ(report.compared, kPages);
  ASSERT_TRUE(rig_.Level().ok());
  EXPECT_THAT(rig_.Differences(), IsEmpty());
  EXPECT_EQ(Comparing(&rig_, Goal::kVerify).Run([] {}).differing, 0u);
}

TEST_F(LiveComparisonTest, AWriteThatDirtyTrackingMissesIsFound) {
  rig_.source_.scratch().FillPage(42, 4711);
  EXPECT_THAT(Comparing(&rig_, Goal::kVerify).Run([] {}).named, ElementsAre(42));
  ASSERT_TRUE(rig_.Level().ok());
  EXPECT_THAT(rig_.Differences(), IsEmpty());
}

// What only left the guest's memory is no difference that anybody has to hear of.
TEST_F(LiveComparisonTest, ADiscardedPageIsNoDifference) {
  ASSERT_EQ(::fallocate(rig_.source_.memory().regions()[0].fd(),
                        FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 30 * kPageBytes, kPageBytes),
            0);
  const ComparisonReport report = Comparing(&rig_, Goal::kVerify).Run([] {});
  EXPECT_EQ(report.differing, 0u);
  EXPECT_EQ(report.aside, 1u);
}

TEST_F(LiveComparisonTest, AnAnswerToAnOlderRequestIsPassedOverAndAWrongOneRefused) {
  Comparing comparing(&rig_, Goal::kVerify);
  ASSERT_TRUE(comparing.Step().ok());
  ASSERT_TRUE(comparing.asked().has_value());
  EXPECT_NE(comparing.asked()->id(), 0u);
  wire::HashReply reply;
  reply.set_id(comparing.asked()->id() + 7);
  reply.set_hashes("nonsense");
  EXPECT_TRUE(comparing.comparison().OnReply(reply).ok());
  EXPECT_TRUE(comparing.comparison().awaits_reply());
  reply.set_id(comparing.asked()->id());
  EXPECT_EQ(comparing.comparison().OnReply(reply).code(), absl::StatusCode::kInvalidArgument);
}

// Arming a synced page would forget what was written to it and not yet looked at.
TEST_F(LiveComparisonTest, ProvingForgetsNoWriteToAPageThatIsSynced) {
  rig_.source_.Write(7, 99);
  ASSERT_TRUE(rig_.sync_->ArmAndWatch({0, 100}).ok());
  ASSERT_TRUE(rig_.Level().ok());
  EXPECT_THAT(rig_.Differences(), IsEmpty());
}

TEST_F(LiveComparisonTest, AnOlderCopyIsProvenAndOnlyWhatChangedIsSent) {
  for (PageIndex page = 60; page < 70; ++page) rig_.source_.Write(page, 5000 + page);
  rig_.source_.Write(90, 0);
  rig_.Restart();
  for (PageIndex page = 200; page < 205; ++page) rig_.source_.Write(page, 6000 + page);
  rig_.Connect(Content::kUnproven);
  const ComparisonReport report = Comparing(&rig_, Goal::kProve).Run([] {});
  EXPECT_EQ(report.compared, kPages);
  EXPECT_EQ(report.differing, 16u);
  EXPECT_EQ(rig_.sync_->progress().pages_sent, 0u) << "nothing is sent before it is proven";
  EXPECT_EQ(rig_.sync_->residual(), 16u);
  rig_.sync_->set_proven();
  ASSERT_TRUE(rig_.Level().ok());
  EXPECT_THAT(rig_.Differences(), IsEmpty());
  EXPECT_EQ(rig_.sync_->progress().pages_sent, 15u);
  EXPECT_EQ(rig_.sync_->progress().pages_zero, 1u) << "holes were proven, too";
}

// The guest, the link and the order of everything, at random.
class RandomComparison : public ::testing::TestWithParam<uint64_t> {
 protected:
  RandomComparison() : random_(GetParam()), rig_({300, 17, 451}) {
    for (PageIndex page = 0; page < kPages; ++page) {
      if (random_() % 3 != 0) rig_.source_.Write(page, random_() | 1);
    }
    Connect(Content::kZero);
    EXPECT_TRUE(rig_.Level().ok());
  }

  void Connect(Content content) {
    FakeLinkOptions options;
    options.seed = random_();
    options.bytes_per_s = 20'000'000;
    options.jitter = absl::Microseconds(random_() % 5000);
    options.short_post_probability = 0.2;
    rig_.Connect(content, options);
  }

  void Write() {
    for (uint64_t i = random_() % 4; i > 0; --i) {
      const bool hot = random_() % 4 != 0;
      const PageIndex page = static_cast<PageIndex>(hot ? random_() % 40 : random_() % kPages);
      rig_.source_.Write(page, random_() % 8 == 0 ? 0 : random_() | 1);
    }
    if (random_() % 64 != 0) return;
    ::fallocate(rig_.source_.memory().regions()[0].fd(), FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
                static_cast<off_t>((random_() % 290) * kPageBytes), 3 * kPageBytes);
  }

  // Until it is done; a lost link now and then, after which the ledger goes on.
  ComparisonReport Compare(Goal goal, bool lose_links) {
    Comparing comparing(&rig_, goal, 50 + random_() % 300);
    for (int i = 0; i < 100'000 && !comparing.comparison().done(); ++i) {
      Write();
      switch (random_() % 5) {
        case 0:
          EXPECT_TRUE(comparing.Step().ok());
          break;
        case 1:
          comparing.TargetHashes();
          break;
        case 2:
          comparing.AnswerComes();
          break;
        case 3:
          if (lose_links && random_() % 100 == 0) {
            rig_.Disconnect();
            Connect(Content::kKept);
          }
          break;
        default:
          EXPECT_TRUE(rig_.sync_->Tick().ok());
          rig_.now_ += absl::Milliseconds(random_() % 20);
      }
    }
    EXPECT_TRUE(comparing.comparison().done());
    return comparing.comparison().report();
  }

  std::mt19937_64 random_;
  SyncRig rig_;
};

TEST_P(RandomComparison, AWritingGuestsCopyNeverSeemsToDiffer) {
  const ComparisonReport report = Compare(Goal::kVerify, /*lose_links=*/true);
  EXPECT_EQ(report.differing, 0u) << ::testing::PrintToString(report.named);
  EXPECT_EQ(report.compared + report.aside, kPages);
  EXPECT_GT(report.compared, kPages / 4);
  ASSERT_TRUE(rig_.Level().ok());
  EXPECT_THAT(rig_.Differences(), IsEmpty());
}

TEST_P(RandomComparison, WhatIsProvenIsEqual) {
  for (int i = 0; i < 100; ++i) Write();
  rig_.Restart();
  for (int i = 0; i < 100; ++i) Write();
  Connect(Content::kUnproven);
  const ComparisonReport report = Compare(Goal::kProve, /*lose_links=*/false);
  EXPECT_GT(report.compared, kPages / 4);
  EXPECT_LT(rig_.sync_->residual(), kPages) << "something was proven";
  rig_.sync_->set_proven();
  ASSERT_TRUE(rig_.Level().ok());
  EXPECT_THAT(rig_.Differences(), IsEmpty());
  EXPECT_LT(rig_.sync_->progress().pages_sent, kPages * 2 / 3) << "less than everything";
}

INSTANTIATE_TEST_SUITE_P(Seeds, RandomComparison, ::testing::Range<uint64_t>(1, 40));

}  // namespace
}  // namespace presync
