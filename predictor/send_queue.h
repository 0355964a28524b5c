// The stale pages of a guest ordered by score, without a word of their own for each page.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "predictor/page.h"

namespace presync {

// Buckets of entries by score. An entry is a hint: it says what the page looked like when it was
// scored, and whoever reads it asks a predicate whether the page still looks like that. So a page
// that is written, sent or scored again needs no search for its old entry. Not thread-safe.
class SendQueue {
 public:
  struct Entry {
    PageIndex page;
    uint16_t stamp;
    uint8_t age_class;
  };

  explicit SendQueue(uint32_t scores) : buckets_(scores) {}

  size_t size() const { return size_; }  // entries, those that no longer hold included

  // Precondition: score is below the constructor's `scores` (not checked).
  void Add(uint32_t score, const Entry& entry) {
    buckets_[score].push_back(entry);
    ++size_;
  }

  // Appends to `*pages` up to `wanted` pages whose entries hold, best score first; of the last
  // score those that come before the others. Entries that no longer hold are dropped on the way,
  // those that do are kept.
  template <typename Holds, typename Before>
  void Best(size_t wanted, Holds holds, Before before, std::vector<PageIndex>* pages);

  // Empties it, and hands back its entries, those that no longer hold included.
  std::vector<Entry> TakeAll() {
    std::vector<Entry> all;
    all.reserve(size_);
    for (std::vector<Entry>& bucket : buckets_) {
      all.insert(all.end(), bucket.begin(), bucket.end());
      bucket.clear();
    }
    size_ = 0;
    return all;
  }

  // Drops all entries that no longer hold.
  template <typename Holds>
  void Clean(Holds holds) {
    for (std::vector<Entry>& bucket : buckets_) CleanBucket(holds, &bucket);
  }

 private:
  template <typename Holds>
  void CleanBucket(Holds holds, std::vector<Entry>* bucket) {
    const size_t before = bucket->size();
    std::erase_if(*bucket, [&](const Entry& entry) { return !holds(entry); });
    size_ -= before - bucket->size();
  }

  std::vector<std::vector<Entry>> buckets_;
  size_t size_ = 0;
};

template <typename Holds, typename Before>
void SendQueue::Best(size_t wanted, Holds holds, Before before, std::vector<PageIndex>* pages) {
  for (size_t score = buckets_.size(); score-- > 0 && wanted > 0;) {
    std::vector<Entry>& bucket = buckets_[score];
    if (bucket.empty()) continue;
    CleanBucket(holds, &bucket);
    if (bucket.size() > wanted) {
      std::nth_element(bucket.begin(), bucket.begin() + wanted, bucket.end(), before);
    }
    const size_t taken = std::min(wanted, bucket.size());
    for (size_t i = 0; i < taken; ++i) pages->push_back(bucket[i].page);
    wanted -= taken;
  }
}

}  // namespace presync
