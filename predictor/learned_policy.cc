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
#include "predictor/page_histories.h"
#include "predictor/sample_ring.h"
#include "predictor/send_queue.h"

namespace presync {
namespace {

using Model = LearnedModel;

constexpr uint32_t kStamps = 1 << LearnedPage::kStampBits;
// Rings of scans have to reach back to the start of the last age class.
constexpr uint32_t kCohorts = 256;
static_assert(Model::kClassAges.back() < kCohorts);
// Words of candidates in which one Choose looks for pages that were never written.
constexpr size_t kBulkWords = 256;

uint32_t AgeClass(uint32_t age) {
  uint32_t age_class = 0;
  while (age_class + 1 < Model::kAgeClasses && Model::kClassAges[age_class + 1] <= age) ++age_class;
  return age_class;
}

class LearnedPolicy final : public SendPolicy {
 public:
  LearnedPolicy(PageCount pages, uint32_t max_streak)
      : histories_(pages, max_streak),
        queue_(Model::kScores),
        written_log2_(kStamps),
        cohorts_(kCohorts) {}

  std::string_view name() const override { return "learned"; }

  void OnScan(absl::Span<const PageRun> written) override {
    histories_.OnScan(written);
    const PageCount pages = CountPages(written);
    written_log2_[now() % kStamps] = static_cast<uint8_t>(std::bit_width(pages));
    samples_.LearnDue(now(), histories_.data(), &model_);
    follow_ = samples_.FollowOneIn(pages);
    ScoreWaiting(written);
    BeginCohort();
    for (uint32_t age_class = 1; age_class < Model::kAgeClasses; ++age_class) {
      if (now() > Model::kClassAges[age_class]) AgeCohort(age_class);
    }
    if (queue_.size() > clean_at_) CleanQueue();
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
        &picked_);
    std::sort(picked_.begin(), picked_.end());
    for (PageIndex page : picked_) AppendRun({page, 1}, chosen);
    if (picked_.size() < pages) PickUnknown(candidates, pages, chosen);
  }

  void OnSent(absl::Span<const PageRun> runs) override { histories_.OnSent(runs); }

 private:
  uint32_t now() const { return histories_.now(); }

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

  bool Holds(const SendQueue::Entry& entry) const {
    const LearnedPage& word = histories_[entry.page];
    return word.stale() && word.stamp() == entry.stamp &&
           AgeClass(word.Age(now())) == entry.age_class;
  }

  void Queue(PageIndex page, uint32_t age_class, const Model::Cells& cells) {
    queue_.Add(model_.Score(cells), {page, static_cast<uint16_t>(histories_[page].stamp()),
                                     static_cast<uint8_t>(age_class)});
  }

  // Pages in back-off stay in the first age class for as long as they wait.
  void ScoreWaiting(absl::Span<const PageRun> written) {
    for (const PageRun& run : written) {
      for (PageIndex page = run.first; page < run.end(); ++page) {
        if (histories_[page].waiting()) Queue(page, 0, Look(page, 0));
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
    for (const PageRun& run : histories_.to_arm()) {
      for (PageIndex page = run.first; page < run.end(); ++page) {
        const Model::Cells cells = Look(page, 0);
        Queue(page, 0, cells);
        if (Followed(page, histories_[page].stamp()))
          samples_.Add(page, now(), histories_[page], cells);
        cohort.push_back(page);
      }
    }
  }

  // The pages last written a class's age ago: scored anew, now that they have come so far.
  void AgeCohort(uint32_t age_class) {
    const uint32_t scan = now() - Model::kClassAges[age_class];
    std::vector<PageIndex>& cohort = cohorts_[scan % kCohorts];
    size_t kept = 0;
    for (PageIndex page : cohort) {
      const LearnedPage& word = histories_[page];
      if (word.waiting() || word.stamp() != scan % kStamps) continue;
      const bool followed = Followed(page, word.stamp());
      if (!word.stale() && !followed) continue;
      const Model::Cells cells = Look(page, age_class);
      if (word.stale()) Queue(page, age_class, cells);
      if (followed) samples_.Add(page, now(), word, cells);
      cohort[kept++] = page;
    }
    cohort.resize(kept);
    if (age_class + 1 == Model::kAgeClasses) std::vector<PageIndex>().swap(cohort);
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
  std::vector<uint8_t> written_log2_;            // of the pages written in each scan, by its stamp
  std::vector<std::vector<PageIndex>> cohorts_;  // pages by the scan of their last write
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
