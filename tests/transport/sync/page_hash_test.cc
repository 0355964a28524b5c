// Hashes of guest memory: the same bytes give the same hashes, holes or not, and a plan that does
// not fit the memory is refused.
#include "transport/sync/page_hash.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <memory>
#include <string>
#include <vector>

#include "tests/transport/scratch_memory.h"

namespace presync {
namespace {

using ::testing::ElementsAre;
using ::testing::IsEmpty;

class PageHashTest : public ::testing::Test {
 protected:
  PageHashTest() : a_(Make()), b_(Make()) {}

  // Two regions; ranges cross their border, and the last is shorter.
  static std::unique_ptr<ScratchMemory> Make() {
    std::unique_ptr<ScratchMemory> made = *ScratchMemory::Create({32, 18});
    for (const PageIndex page : {0u, 7u, 8u, 31u, 32u, 49u}) made->FillPage(page, page + 1);
    return made;
  }

  std::vector<PageRun> Differing(const HashPlan& plan) const {
    const absl::StatusOr<std::string> a = HashPages(a_->memory(), plan);
    const absl::StatusOr<std::string> b = HashPages(b_->memory(), plan);
    EXPECT_TRUE(a.ok() && b.ok());
    return DifferingRanges(plan, *a, *b);
  }

  const std::unique_ptr<ScratchMemory> a_;
  const std::unique_ptr<ScratchMemory> b_;
};

TEST_F(PageHashTest, EqualMemoryHasEqualHashesHoleOrZero) {
  b_->ZeroPage(20);  // a hole there
  EXPECT_THAT(Differing({.run = {0, 50}, .pages_per_hash = 8, .only = {}}), IsEmpty());
}

TEST_F(PageHashTest, RangesThatDifferAreFound) {
  b_->FillPage(33, 9);
  b_->FillPage(49, 9);
  EXPECT_THAT(Differing({.run = {0, 50}, .pages_per_hash = 12, .only = {}}),
              ElementsAre(PageRun{24, 12}, PageRun{48, 2}));
  EXPECT_THAT(Differing({.run = {30, 20}, .pages_per_hash = 1, .only = {}}),
              ElementsAre(PageRun{33, 1}, PageRun{49, 1}));
}

TEST_F(PageHashTest, OnlyTheRangesAskedFor) {
  b_->FillPage(33, 9);
  const HashPlan all = {.run = {0, 50}, .pages_per_hash = 12, .only = {}};
  HashPlan some = all;
  some.only = {0, 2, 4};
  const std::string all_hashes = *HashPages(b_->memory(), all);
  const std::string some_hashes = *HashPages(b_->memory(), some);
  ASSERT_EQ(some_hashes.size(), 3 * kHashBytes);
  EXPECT_EQ(some_hashes.substr(kHashBytes, kHashBytes),
            all_hashes.substr(2 * kHashBytes, kHashBytes));
  EXPECT_THAT(Differing(some), ElementsAre(PageRun{24, 12}));
  some.only = {1, 4};
  EXPECT_THAT(Differing(some), IsEmpty());
}

// The other side chooses the length of a range: it must not cost more than the memory there is.
TEST_F(PageHashTest, RangesLongerThanTheRunEndWithIt) {
  const HashPlan longest = {.run = {0, 50}, .pages_per_hash = UINT32_MAX, .only = {}};
  const HashPlan whole = {.run = {0, 50}, .pages_per_hash = 50, .only = {}};
  EXPECT_EQ(*HashPages(a_->memory(), longest), *HashPages(a_->memory(), whole));
}

TEST_F(PageHashTest, PlansThatDoNotFitAreRefused) {
  const auto refused = [&](const HashPlan& plan) {
    return absl::IsInvalidArgument(HashPages(a_->memory(), plan).status());
  };
  EXPECT_TRUE(refused({.run = {0, 0}, .pages_per_hash = 1, .only = {}}));
  EXPECT_TRUE(refused({.run = {0, 51}, .pages_per_hash = 1, .only = {}}));
  EXPECT_TRUE(refused({.run = {50, 1}, .pages_per_hash = 1, .only = {}}));
  EXPECT_TRUE(refused({.run = {1, UINT32_MAX}, .pages_per_hash = 1, .only = {}}));
  EXPECT_TRUE(refused({.run = {0, 50}, .pages_per_hash = 0, .only = {}}));
  EXPECT_TRUE(refused({.run = {0, 50}, .pages_per_hash = 12, .only = {5}}));
  EXPECT_TRUE(refused({.run = {0, 50}, .pages_per_hash = 12, .only = {2, 2}}));
  EXPECT_TRUE(refused({.run = {0, 50}, .pages_per_hash = 12, .only = {3, 2}}));
}

}  // namespace
}  // namespace presync
