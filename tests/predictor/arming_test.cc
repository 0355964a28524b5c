// The arming back-off: which written pages are armed again, and what that saves a guest.
#include <functional>
#include <memory>
#include <random>
#include <string_view>
#include <utility>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "predictor/arming_ring.h"
#include "predictor/page_histories.h"
#include "predictor/policy.h"

namespace presync {
namespace {

using ::testing::ElementsAre;
using ::testing::ElementsAreArray;
using ::testing::IsEmpty;

TEST(ArmingRingTest, GivesBackEachScansPagesSorted) {
  ArmingRing ring(100);
  EXPECT_TRUE(ring.Add(20, 3));
  EXPECT_TRUE(ring.Add(21, 3));
  EXPECT_TRUE(ring.Add(22, 4));
  EXPECT_TRUE(ring.Add(5, 3));
  EXPECT_EQ(ring.runs(), 3u);
  EXPECT_THAT(ring.TakeDue(1), IsEmpty());
  EXPECT_THAT(ring.TakeDue(3), ElementsAre(PageRun{5, 1}, PageRun{20, 2}));
  EXPECT_THAT(ring.TakeDue(3 + ArmingRing::kScans), IsEmpty());
  EXPECT_THAT(ring.TakeDue(4), ElementsAre(PageRun{22, 1}));
  EXPECT_EQ(ring.runs(), 0u);
}

TEST(ArmingRingTest, IsBounded) {
  ArmingRing ring(2);
  EXPECT_TRUE(ring.Add(10, 1));
  EXPECT_TRUE(ring.Add(20, 2));
  EXPECT_FALSE(ring.Add(30, 1));
  EXPECT_TRUE(ring.Add(11, 1)) << "joins a run, takes no room";
  ring.TakeDue(1);
  EXPECT_TRUE(ring.Add(30, 2));
}

// A page that is written in every scan is armed after scans 1, 3, 7, 15, 31, 63, 95, ...: it is
// looked at once in 2^streak scans, and once in 32 from the sixth sight on.
TEST(ArmingBackOffTest, AHotPageIsLookedAtEverLessOften) {
  PageHistories<PageHistory> histories(10, 5);
  const std::vector<PageRun> page = {{4, 1}};
  histories.OnSent(page);
  bool armed = true;
  std::vector<uint32_t> faults, armings;
  while (histories.now() < 130) {
    histories.OnScan(armed ? page : std::vector<PageRun>());
    if (armed) faults.push_back(histories.now());
    armed = !histories.to_arm().empty();
    if (armed) armings.push_back(histories.now());
  }
  EXPECT_THAT(faults, ElementsAreArray({1, 2, 4, 8, 16, 32, 64, 96, 128}));
  EXPECT_THAT(armings, ElementsAreArray({1, 3, 7, 15, 31, 63, 95, 127}));
}

TEST(ArmingBackOffTest, OffMeansArmedAtOnce) {
  PageHistories<PageHistory> histories(10, 0);
  const std::vector<PageRun> pages = {{4, 3}};
  for (int scan = 0; scan < 20; ++scan) {
    histories.OnScan(pages);
    EXPECT_THAT(histories.to_arm(), ElementsAre(PageRun{4, 3}));
  }
}

TEST(ArmingBackOffTest, ASentPageLeavesTheBackOff) {
  PageHistories<PageHistory> histories(10, 5);
  const std::vector<PageRun> page = {{4, 1}};
  for (int scan = 1; scan <= 3; ++scan) histories.OnScan(page);  // streak 2: due after scan 6
  EXPECT_TRUE(histories[4].waiting());
  histories.OnSent(page);
  EXPECT_FALSE(histories[4].waiting());
  for (int scan = 4; scan <= 40; ++scan) {
    histories.OnScan({});
    EXPECT_THAT(histories.to_arm(), IsEmpty()) << "armed by its sending already";
  }
}

TEST(ArmingBackOffTest, DueAndFreshPagesComeMergedInOrder) {
  PageHistories<PageHistory> histories(100, 5);
  const std::vector<PageRun> hot = {{10, 2}, {50, 1}};
  histories.OnScan(hot);
  histories.OnScan(hot);  // streak 1: due after scan 3
  EXPECT_THAT(histories.to_arm(), IsEmpty());
  histories.OnScan(std::vector<PageRun>{{5, 1}, {12, 3}, {70, 1}});
  EXPECT_THAT(histories.to_arm(),
              ElementsAre(PageRun{5, 1}, PageRun{10, 5}, PageRun{50, 1}, PageRun{70, 1}));
}

// Isolated hot pages beyond the ring's room (4096 runs here) are armed as if there were no
// back-off.
TEST(ArmingBackOffTest, AFullRingCostsFaultsOnly) {
  constexpr PageCount kHot = 5000;
  PageHistories<PageHistory> histories(2 * kHot, 5);
  std::vector<PageRun> hot;
  for (PageIndex i = 0; i < kHot; ++i) hot.push_back({2 * i, 1});
  histories.OnScan(hot);
  histories.OnScan(hot);
  EXPECT_EQ(CountPages(histories.to_arm()), kHot - 4096);
}

struct Cost {
  uint64_t sent = 0;          // pages
  uint64_t write_faults = 0;  // pages that were armed and then written
};

// A guest, its dirty log and the sync's rhythm, reduced to sets of pages.
class GuestModel {
 public:
  GuestModel(PageCount pages, PageCount set_point, std::unique_ptr<SendPolicy> policy)
      : policy_(std::move(policy)), set_point_(set_point), armed_(pages), stale_(pages, true) {}

  void Scan(const PageBitmap& written) {
    PageBitmap seen = written;
    seen.And(armed_);
    armed_.AndNot(seen);
    stale_.Or(seen);
    cost_.write_faults += seen.count();

    std::vector<PageRun> runs;
    seen.AppendRunsWithin({0, seen.size()}, &runs);
    policy_->OnScan(runs);
    std::vector<PageRun> to_arm;
    policy_->AppendPagesToArm(&to_arm);
    for (const PageRun& run : to_arm) {
      EXPECT_EQ(armed_.CountWithin(run), 0u) << "armed already";
      EXPECT_EQ(stale_.CountWithin(run), run.count) << "synced pages are armed already";
      armed_.Set(run);
    }
    if (stale_.count() <= set_point_) return;
    policy_->Choose(stale_, stale_.count() - set_point_, &runs);
    for (const PageRun& run : runs) {
      stale_.Clear(run);
      armed_.Set(run);
    }
    policy_->OnSent(runs);
    cost_.sent += CountPages(runs);
  }

  const Cost& cost() const { return cost_; }

 private:
  std::unique_ptr<SendPolicy> policy_;
  PageCount set_point_;
  PageBitmap armed_;
  PageBitmap stale_;
  Cost cost_;
};

using WritesOfScan = std::function<void(int scan, std::mt19937& random, PageBitmap* written)>;

Cost RunGuest(std::string_view policy, uint32_t max_back_off_log2, PageCount pages,
              PageCount set_point, const WritesOfScan& writes_of_scan) {
  auto made = MakePolicy(policy, pages, {.max_back_off_log2 = max_back_off_log2});
  EXPECT_TRUE(made.ok()) << made.status();
  GuestModel guest(pages, set_point, *std::move(made));
  std::mt19937 random(11);
  for (int scan = 0; scan < 600; ++scan) {
    PageBitmap written(pages);
    writes_of_scan(scan, random, &written);
    guest.Scan(written);
  }
  return guest.cost();
}

// 400 hot pages are written in 19 of 20 scans, the others once in 60 to 4000 scans. In the middle
// the hot set moves on by half its size, so that cooling has to be noticed.
void HotGuest(int scan, std::mt19937& random, PageBitmap* written) {
  constexpr PageCount kHot = 400;
  const PageIndex hot_first = 1000 + (scan < 300 ? 0 : kHot / 2);
  for (PageIndex page = 0; page < written->size(); ++page) {
    const bool hot = page >= hot_first && page < hot_first + kHot;
    const uint32_t draw = random();
    if (hot ? draw % 20 != 0 : draw % (60 + page) == 0) written->Set({page, 1});
  }
}

// A player: 40 pages written in every scan, 60 in every tenth, and a ring of 1200 of which each
// scan writes the next 24.
void PlayerGuest(int scan, std::mt19937&, PageBitmap* written) {
  written->Set({100, 40});
  if (scan % 10 == 0) written->Set({200, 60});
  written->Set({1000 + scan % 50 * 24u, 24});
}

TEST(ArmingBackOffTest, SavesMostFaultsOfAHotGuestAndSendsHardlyMore) {
  const Cost without = RunGuest("ewma", 0, 4096, 600, HotGuest);
  const Cost with = RunGuest("ewma", 5, 4096, 600, HotGuest);
  RecordProperty("faults_without", static_cast<int>(without.write_faults));
  RecordProperty("faults_with", static_cast<int>(with.write_faults));
  RecordProperty("sent_without", static_cast<int>(without.sent));
  RecordProperty("sent_with", static_cast<int>(with.sent));
  EXPECT_LE(with.write_faults * 10, without.write_faults * 4);
  EXPECT_LE(with.sent * 100, without.sent * 101);
}

// Nobody can send less than each page once and then the 24 pages that each scan turns cold.
// "oldest" has to wait until age tells that they are, and meanwhile gives up the pages written in
// every tenth scan.
TEST(EwmaPolicyTest, IsNearTheLeastPossibleForAPlayerAndOldestIsNot) {
  constexpr PageCount kPages = 4096, kSetPoint = 150;
  constexpr uint64_t kLeast = kPages - kSetPoint + 600 * 24;
  EXPECT_LT(RunGuest("ewma", 5, kPages, kSetPoint, PlayerGuest).sent * 100, kLeast * 103);
  EXPECT_GT(RunGuest("oldest", 5, kPages, kSetPoint, PlayerGuest).sent * 100, kLeast * 110);
  EXPECT_GT(RunGuest("every-scan", 5, kPages, kSetPoint, PlayerGuest).sent, kLeast * 2);
}

}  // namespace
}  // namespace presync
