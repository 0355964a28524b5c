// The learned policy: sends first what this guest's own past says will not be written soon.
#pragma once

#include <cstdint>
#include <memory>

#include "predictor/page.h"
#include "predictor/policy.h"

namespace presync {

// For guests of `pages` pages; back-off spans are at most 2^max_streak scans. 4 bytes a page; the
// model's tables and samples, about 1.3 MB whatever the guest; some 16 bytes for each stale page;
// and what PageHistories says for pages in back-off.
std::unique_ptr<SendPolicy> MakeLearnedPolicy(PageCount pages, uint32_t max_streak);

}  // namespace presync
