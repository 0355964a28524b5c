// The policies that go by the history of each page alone: "ewma" and "oldest".
#pragma once

#include <cstdint>
#include <memory>

#include "predictor/page.h"
#include "predictor/policy.h"

namespace presync {

// For guests of `pages` pages; back-off spans are at most 2^max_streak scans. What each sends first
// is in policy.h; 4 bytes a page, and what PageHistories says for pages in back-off.
std::unique_ptr<SendPolicy> MakeEwmaPolicy(PageCount pages, uint32_t max_streak);
std::unique_ptr<SendPolicy> MakeOldestPolicy(PageCount pages, uint32_t max_streak);

}  // namespace presync
