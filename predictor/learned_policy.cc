#include "predictor/learned_policy.h"

#include <algorithm>
#include <array>
#include <bit>
#include <string_view>
#include <utility>
#include <vector>

#include "predictor/bitmap.h"
#include "predictor/check.h"
#include "predictor/choose.h"
#include "predictor/learned_model.h"
#include "predictor/learned_page.h"
#include "predictor/order_contest.h"
#include "predictor/page_histories.h"
#include "predictor/sample_ring.h"
#include "predictor/send_queue.h"

namespace presync {
namespace {

using Model = LearnedModel;

constexpr uint32_t kStamps = 1 << LearnedPage::kStampBits;
// Rings of scans have to reach back to the start of the last age class.
constexpr uint32_t kCohorts = 2048;
static_assert(Model::kClassAges.back() < kCohorts);
// How many pages ahead a word is asked for.
constexpr size_t kPrefetchPages = 8;
// Words of candidates in which one Choose looks for pages that were never written.
constexpr size_t kBulkWords = 256;

// A page may go unwatched for this part of a stay: 1/11 costs hardly a byte (docs/prediction.md,
// "Arming back-off").
constexpr uint32_t kSparePart = 11;
// Below this part of a stay a page is hardly ever sent: its age classes there are passed over,
// which halves the cost for half a per cent of bytes. From 24 scans on none is.
constexpr uint32_t kYoungPart = 16;
constexpr uint32_t kLongStay = 24 * kYoungPart;

// For how long a stale page stays until it is sent, on average over some 128 scans: by Little's law
// the size of the stale set over the pages that come to it in a scan. While it fills up, that is
// how long it takes to.
class Stay {
 public:
  void EndScan(PageCount size, PageCount newly_stale) {
    size_sum_ += uint64_t{size} * kOne - size_sum_ / 128;
    came_sum_ += uint64_t{newly_stale} * kOne - came_sum_ / 128;
  }
  uint32_t scans() const {
    return static_cast<uint32_t>(std::min<uint64_t>(size_sum_ / (came_sum_ + kOne), kLongest));
  }

 private:
  static constexpr uint64_t kOne = 256;  // a page, in fixed point
  static constexpr uint64_t kLongest = LearnedPage::kMaxAge;

  uint64_t size_sum_ = 0;
  uint64_t came_sum_ = 0;
};

class LearnedPolicy final : public SendPolicy {
 public:
  LearnedPolicy(PageCount pages, uint32_t max_streak)
      : histories_(pages, max_streak),
        queue_(Model::kScores),
        written_log2_(kStamps),
        cohorts_(kCohorts),
        scored_class_(kCohorts) {}

  std::string_view name() const override { return "learned"; }

  void OnScan(absl::Span<const PageRun> written) override {
    // Up to the set-point the stale set grows; what it holds beyond that waits for the link.
    const PageCount size = std::max(stale_, set_point_);
    contest_.SetSize(size);
    const PageCount newly_stale = CountNewlyStale(written);
    stay_.EndScan(size, newly_stale);
    stale_ += newly_stale;
    histories_.SetSpareScans(stay_.scans() / kSparePart);
    histories_.OnScan(written);
    const PageCount pages = CountPages(written);
    written_log2_[now() % kStamps] = static_cast<uint8_t>(std::bit_width(pages));
    samples_.LearnDue(now(), histories_.data(), &model_);
    follow_ = samples_.FollowOneIn(pages);
    ScoreWaiting(written);
    BeginCohort();
    for (uint32_t age_class = 1; age_class < Model::kAgeClasses; ++age_class) {
      if (now() > Model::kClassAges[age_class] && Matters(age_class)) AgeCohort(age_class);
    }
    if (contest_.EndScan()) ScoreAllAnew();
    if (queue_.size() > clean_at_) CleanQueue();
  }

  PageCount Goal(PageCount set_point) override {
    set_point_ = set_point;
    return set_point;
  }

  void AppendPagesToArm(std::vector<PageRun>* out) override {
    out->insert(out->end(), histories_.to_arm().begin(), histories_.to_arm().end());
  }

  void Choose(const PageBitmap& candidates, PageCount pages,
              std::vector<PageRun>* chosen) override {
    PRESYNC_CHECK(candidates.size() == histories_.pages());
    chosen->clear();
    if (pages == 0) return;
    if (pages >= candidates.count()) {
      candidates.AppendRunsWithin({0, candidates.size()}, chosen);
      return;
    }
    picked_.clear();
    PickNeverWritten(candidates, pages);
    queue_.Best(
        pages - picked_.size(),
        [&](const SendQueue::Entry& entry) { return candidates.Test(entry.page) && Holds(entry); },
        [now = now(), by_age = contest_.leader() == OrderContest::kByAge](const auto& a,
                                                                          const auto& b) {
          if (by_age && a.stamp != b.stamp) {
            return (now - a.stamp) % kStamps > (now - b.stamp) % kStamps;
          }
          return a.page < b.page;
        },
        &picked_);
    std::sort(picked_.begin(), picked_.end());
    for (PageIndex page : picked_) AppendRun({page, 1}, chosen);
    if (picked_.size() < pages) PickUnknown(candidates, pages, chosen);
  }

  void OnSent(absl::Span<const PageRun> runs) override {
    for (const PageRun& run : runs) {
      for (PageIndex page = run.first; page < run.end(); ++page) {
        stale_ -= histories_[page].stale();
        // Its back-off ends with that. In the shadows of rivals that kept it, it ages from here on.
        if (histories_[page].waiting() && contest_.Holds(page)) {
          contest_.OnWatched(page);
          cohorts_[now() % kCohorts].push_back(page);
        }
      }
    }
    histories_.OnSent(runs);
  }

 private:
  uint32_t now() const { return histories_.now(); }

  PageCount CountNewlyStale(absl::Span<const PageRun> written) const {
    PageCount newly_stale = 0;
    for (size_t i = 0; i < written.size(); ++i) {
      if (i + kPrefetchPages < written.size()) {
        __builtin_prefetch(histories_.data() + written[i + kPrefetchPages].first, 1);
      }
      const PageRun& run = written[i];
      for (PageIndex page = run.first; page < run.end(); ++page) {
        newly_stale += !histories_[page].stale();
      }
    }
    return newly_stale;
  }

  // How the neighbour `page` stands to a page of age `age`: which was written first, and by how
  // much.
  uint32_t Neighbour(PageIndex page, uint32_t age) const {
    if (page >= histories_.pages() || !histories_[page].written()) return 15;
    const uint32_t its_age = histories_[page].Age(now());
    if (its_age == age) return 14;
    if (its_age < age) return std::min<uint32_t>(std::bit_width(age - its_age) - 1, 6);
    return 7 + std::min<uint32_t>(std::bit_width(its_age - age) - 1, 6);
  }

  Model::Cells Look(PageIndex page, uint32_t age_class) const {
    const LearnedPage& word = histories_[page];
    const uint32_t age = word.Age(now());
    return Model::Locate({
        .page = page,
        .age_class = age_class,
        .gap_log2_quarters = word.gap_log2_quarters(),
        .last_gap = word.last_gap(),
        .writes = word.writes(),
        .run_log4 = word.run_log4(),
        .stamp = word.stamp(),
        .written_then_log2 = written_log2_[word.stamp()],
        .written_now_log2 = written_log2_[now() % kStamps],
        .before = Neighbour(page - 1, age),
        .after = Neighbour(page + 1, age),
    });
  }

  // The age class in which the page was scored last.
  uint32_t ScoredClass(const LearnedPage& word) const {
    if (word.waiting()) return 0;
    if (word.Age(now()) >= kCohorts) return Model::kAgeClasses - 1;
    return scored_class_[word.stamp() % kCohorts];
  }

  bool Holds(const SendQueue::Entry& entry) const {
    const LearnedPage& word = histories_[entry.page];
    return word.stale() && word.stamp() == entry.stamp && ScoredClass(word) == entry.age_class;
  }

  void Queue(PageIndex page, uint32_t age_class, const OrderContest::Scores& scores) {
    queue_.Add(scores[contest_.leader()], {page, static_cast<uint16_t>(histories_[page].stamp()),
                                           static_cast<uint8_t>(age_class)});
  }

  // A page that counts as written in this scan.
  void QueueWritten(PageIndex page, const Model::Cells& cells) {
    const OrderContest::Scores scores = model_.Scores(cells);
    contest_.OnWritten(page, scores, histories_[page].waiting());
    Queue(page, 0, scores);
  }

  // Pages in back-off stay in the first age class for as long as they wait.
  void ScoreWaiting(absl::Span<const PageRun> written) {
    for (const PageRun& run : written) {
      for (PageIndex page = run.first; page < run.end(); ++page) {
        if (histories_[page].waiting()) QueueWritten(page, Look(page, 0));
      }
    }
  }

  // A sample of the writes is followed until the page is written again, sent or not.
  bool Followed(PageIndex page, uint32_t stamp) const {
    uint32_t hash = (page * 0x9e3779b1) ^ (stamp * 0x85ebca77);
    hash = (hash ^ hash >> 15) * 0x2c1b3c6d;
    return (hash >> 16) % follow_ == 0;
  }

  // The pages that age from this scan on: written and watched, or back from their back-off.
  void BeginCohort() {
    std::vector<PageIndex>& cohort = cohorts_[now() % kCohorts];
    cohort.clear();
    scored_class_[now() % kCohorts] = 0;
    for (const PageRun& run : histories_.to_arm()) {
      for (PageIndex page = run.first; page < run.end(); ++page) {
        const Model::Cells cells = Look(page, 0);
        QueueWritten(page, cells);
        if (Followed(page, histories_[page].stamp()))
          samples_.Add(page, now(), histories_[page], cells);
        cohort.push_back(page);
      }
    }
  }

  // Is a page that young ever sent? Those that stay for long keep the score of their writing.
  bool Matters(uint32_t age_class) const {
    return Model::kClassAges[age_class] * kYoungPart >= std::min(stay_.scans(), kLongStay);
  }

  // The pages last written a class's age ago: scored anew, now that they have come so far.
  void AgeCohort(uint32_t age_class) {
    const uint32_t scan = now() - Model::kClassAges[age_class];
    std::vector<PageIndex>& cohort = cohorts_[scan % kCohorts];
    scored_class_[scan % kCohorts] = static_cast<uint8_t>(age_class);
    size_t kept = 0;
    for (size_t i = 0; i < cohort.size(); ++i) {
      if (i + kPrefetchPages < cohort.size()) {
        __builtin_prefetch(histories_.data() + cohort[i + kPrefetchPages]);
      }
      const PageIndex page = cohort[i];
      const LearnedPage& word = histories_[page];
      if (word.waiting() || word.stamp() != scan % kStamps) continue;
      const bool followed = Followed(page, word.stamp());
      const bool held = contest_.Holds(page);
      if (!word.stale() && !followed && !held) continue;
      const Model::Cells cells = Look(page, age_class);
      if (word.stale() || held) {
        const OrderContest::Scores scores = model_.Scores(cells);
        if (word.stale()) Queue(page, age_class, scores);
        if (held) contest_.OnAged(page, scores);
      }
      if (followed) samples_.Add(page, now(), word, cells);
      cohort[kept++] = page;
    }
    cohort.resize(kept);
    if (age_class + 1 == Model::kAgeClasses) std::vector<PageIndex>().swap(cohort);
  }

  // Under a new leader.
  void ScoreAllAnew() {
    for (const SendQueue::Entry& entry : queue_.TakeAll()) {
      if (!Holds(entry)) continue;
      Queue(entry.page, entry.age_class, model_.Scores(Look(entry.page, entry.age_class)));
    }
  }

  void CleanQueue() {
    queue_.Clean([&](const SendQueue::Entry& entry) { return Holds(entry); });
    clean_at_ = 3 * queue_.size() + kLeastClean;
  }

  // The bulk phase: pages that the queue never heard of. Walks from the first word in which the
  // last call found some, until it has found enough or has seen kBulkWords words in a row without
  // any.
  void PickNeverWritten(const PageBitmap& candidates, PageCount pages) {
    const absl::Span<const uint64_t> words = candidates.words();
    size_t word = bulk_word_;
    size_t fruitless = 0;
    for (size_t looked = 0; looked < words.size() && fruitless < kBulkWords; ++looked) {
      const size_t before = picked_.size();
      for (uint64_t bits = words[word]; bits != 0 && picked_.size() < pages; bits &= bits - 1) {
        const PageIndex page = static_cast<PageIndex>(word * 64 + std::countr_zero(bits));
        if (!histories_[page].written()) picked_.push_back(page);
      }
      fruitless = picked_.size() > before ? 0 : fruitless + 1;
      if (picked_.size() == pages) break;
      if (++word == words.size()) word = 0;
    }
    bulk_word_ = picked_.empty() ? word : picked_.front() / 64;
  }

  // Candidates that were written, but are not in the queue: a lost link made them stale again, or
  // they were in flight when their turn came. Oldest first.
  void PickUnknown(const PageBitmap& candidates, PageCount pages, std::vector<PageRun>* chosen) {
    PageBitmap rest = candidates;
    for (const PageRun& run : *chosen) rest.Clear(run);
    std::vector<PageRun> more;
    ChooseByScore(
        rest, pages - CountPages(*chosen), LearnedPage::kMaxAge + 2,
        [this](PageIndex page) { __builtin_prefetch(histories_.data() + page); },
        [this](PageIndex page) {
          const LearnedPage& word = histories_[page];
          return word.written() ? word.Age(now()) : LearnedPage::kMaxAge + 1;
        },
        &more);
    PageBitmap all(candidates.size());
    for (const PageRun& run : *chosen) all.Set(run);
    for (const PageRun& run : more) all.Set(run);
    chosen->clear();
    all.AppendRunsWithin({0, all.size()}, chosen);
  }

  static constexpr size_t kLeastClean = 4096;

  PageHistories<LearnedPage> histories_;
  LearnedModel model_;
  SampleRing samples_;
  SendQueue queue_;
  OrderContest contest_;
  Stay stay_;
  PageCount set_point_ = 0;                      // as Goal was told last
  PageCount stale_ = 0;                          // as far as the words know
  std::vector<uint8_t> written_log2_;            // of the pages written in each scan, by its stamp
  std::vector<std::vector<PageIndex>> cohorts_;  // pages by the scan of their last write
  std::vector<uint8_t> scored_class_;            // the age class that each cohort has come to
  uint32_t follow_ = 1;                          // one write in so many
  size_t clean_at_ = kLeastClean;
  size_t bulk_word_ = 0;
  std::vector<PageIndex> picked_;
};

}  // namespace

std::unique_ptr<SendPolicy> MakeLearnedPolicy(PageCount pages, uint32_t max_streak) {
  return std::make_unique<LearnedPolicy>(pages, max_streak);
}

}  // namespace presync
