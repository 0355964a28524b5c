#include "transport/sync/unsettled_pages.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <map>
#include <optional>
#include <random>
#include <vector>

namespace presync {
namespace {

using ::testing::ElementsAre;

constexpr absl::Duration kPatience = absl::Seconds(2);
constexpr absl::Duration kInfinite = absl::InfiniteDuration();

std::vector<PageIndex> PagesOf(const PageBitmap& bitmap) {
  std::vector<PageIndex> pages;
  for (PageIndex page = 0; page < bitmap.size(); ++page) {
    if (bitmap.Test(page)) pages.push_back(page);
  }
  return pages;
}

class UnsettledPagesTest : public ::testing::Test {
 protected:
  RequestLook LookOf(absl::Duration longest) { return {.at = now_, .longest = longest}; }
  void Look(absl::Duration longest, absl::Duration later = absl::Milliseconds(500)) {
    now_ += later;
    pages_.OnLook(LookOf(longest), now_);
  }
  void FindRipeEqual() {
    const std::vector<PageIndex> ripe = PagesOf(pages_.ripe());
    for (const PageIndex page : ripe) {
      const PageRun run = {page, 1};
      pages_.OnEqual({&run, 1});
    }
  }
  // Reads page 7 and has it presumed settled.
  void Presume7() {
    pages_.OnRead({7, 1});
    Look(absl::ZeroDuration());
    Look(absl::ZeroDuration(), kPatience);
    ASSERT_THAT(PagesOf(pages_.ripe()), ElementsAre(7));
    FindRipeEqual();
    ASSERT_EQ(pages_.count(), 0u);
  }

  absl::Time now_ = absl::UnixEpoch() + absl::Hours(1);
  UnsettledPages pages_{100, kPatience};
};

TEST_F(UnsettledPagesTest, IsComparedAtTheStandstillUntilItWasComparedLater) {
  pages_.OnRead({7, 2});
  EXPECT_THAT(PagesOf(pages_.AtStandstill(LookOf(absl::ZeroDuration()))), ElementsAre(7, 8));
}

TEST_F(UnsettledPagesTest, ALookThatSaysNothingRipensNothing) {
  pages_.OnRead({7, 1});
  for (int i = 0; i < 100; ++i) Look(kInfinite);
  EXPECT_TRUE(pages_.ripe().empty());
  EXPECT_EQ(pages_.count(), 1u);
}

TEST_F(UnsettledPagesTest, SettledPagesNeedNoComparison) {
  Presume7();
  EXPECT_THAT(PagesOf(pages_.AtStandstill(LookOf(absl::ZeroDuration()))), ElementsAre());
}

// It may have been in flight when the page was read, and have filled it after the comparison.
TEST_F(UnsettledPagesTest, ARequestThatLastedLongerMakesThemUnsettledAgain) {
  Presume7();
  const uint64_t doubts = pages_.doubts();
  Look(absl::Seconds(40));
  EXPECT_EQ(pages_.count(), 1u);
  EXPECT_NE(pages_.doubts(), doubts);
}

TEST_F(UnsettledPagesTest, SoDoesOneThatEndedWhenTheDevicesWereDrained) {
  Presume7();
  EXPECT_THAT(PagesOf(pages_.AtStandstill(LookOf(absl::Seconds(40)))), ElementsAre(7));
}

TEST_F(UnsettledPagesTest, SoDoesALastLookThatFailed) {
  Presume7();
  EXPECT_THAT(PagesOf(pages_.AtStandstill(RequestLook{})), ElementsAre(7));
}

TEST_F(UnsettledPagesTest, SlowRequestsAreGivenMoreTime) {
  pages_.OnRead({7, 1});
  Look(absl::Seconds(5));
  for (int i = 0; i < 19; ++i) {  // 9.5 s
    Look(absl::Seconds(5));
    ASSERT_TRUE(pages_.ripe().empty());
  }
  Look(absl::Seconds(5));
  EXPECT_THAT(PagesOf(pages_.ripe()), ElementsAre(7));
}

TEST_F(UnsettledPagesTest, APageThatIsReadAgainBeginsAnew) {
  Presume7();
  pages_.OnRead({7, 1});
  EXPECT_EQ(pages_.count(), 1u);
  pages_.Forget({7, 1});
  EXPECT_EQ(pages_.count(), 0u);
}

// The whole rule, against a guest whose disk takes its time. Reads are submitted, which is seen,
// and fill their pages some time later, which is not; pages are copied, compared and copied again,
// at random. When all has been drained no page may differ from its copy but those that are to be
// compared.
class RandomReads : public ::testing::TestWithParam<uint32_t> {};

TEST_P(RandomReads, NoPageThatChangedUnseenIsLeftOut) {
  constexpr PageCount kPages = 64;
  std::mt19937 random(GetParam());
  const auto below = [&](uint32_t n) { return random() % n; };
  UnsettledPages pages(kPages, absl::Milliseconds(300));
  std::vector<uint64_t> content(kPages), copy(kPages);
  std::vector<bool> stale(kPages, true);
  struct Read {
    PageIndex page;
    absl::Time since, until;
  };
  std::vector<Read> reads;
  absl::Time now = absl::UnixEpoch();
  absl::Duration longest;  // that ended since the last look
  uint64_t value = 0;
  const auto end_reads = [&](absl::Time until) {
    std::erase_if(reads, [&](const Read& read) {
      if (read.until > until) return false;
      content[read.page] = ++value;  // past the dirty log
      longest = std::max(longest, read.until - read.since);
      return true;
    });
  };
  PageCount found_late = 0;
  for (int step = 0; step < 4000; ++step) {
    now += absl::Milliseconds(10);
    end_reads(now);
    if (below(3) == 0) {  // a read is submitted; one in a hundred hangs
      const PageIndex page = below(kPages);
      const absl::Duration takes =
          absl::Milliseconds(below(100) == 0 ? 1000 + below(6000) : below(120));
      reads.push_back({page, now, now + takes});
      stale[page] = true;
      pages.Forget({page, 1});
    }
    for (int i = 0; i < 2; ++i) {  // pages are sent
      const PageIndex page = below(kPages);
      if (!stale[page]) continue;
      stale[page] = false;
      pages.OnRead({page, 1});
      copy[page] = content[page];
    }
    if (step % 10 == 0) {
      pages.OnLook({.at = now, .longest = longest}, now);
      longest = absl::ZeroDuration();
    }
    if (step % 7 == 0) {  // what is ripe is compared
      for (const PageIndex page : PagesOf(pages.ripe())) {
        const PageRun run = {page, 1};
        if (copy[page] == content[page]) {
          pages.OnEqual({&run, 1});
        } else {
          ++found_late;
          stale[page] = true;
          pages.Forget(run);
        }
      }
    }
  }
  now += absl::Seconds(10);
  end_reads(now);
  const PageBitmap left = pages.AtStandstill({.at = now, .longest = longest});
  for (PageIndex page = 0; page < kPages; ++page) {
    if (stale[page] || left.Test(page)) continue;
    EXPECT_EQ(copy[page], content[page]) << "page " << page;
  }
  EXPECT_GT(found_late, 0u) << "this guest was too easy";
}

INSTANTIATE_TEST_SUITE_P(Seeds, RandomReads, ::testing::Range(1u, 41u));

}  // namespace
}  // namespace presync
