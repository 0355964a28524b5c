// The policies that learn nothing: what others do, to compare with.
#pragma once

#include <cstdint>
#include <memory>

#include "predictor/page.h"
#include "predictor/policy.h"

namespace presync {

// What each sends is in policy.h. They arm a page only by sending it, except "skip-if-dirty", which
// has to see whether a page is written again: a bit a page.
std::unique_ptr<SendPolicy> MakeEveryScanPolicy();
// Precondition (CHECKed): scans_per_second is above 0.
std::unique_ptr<SendPolicy> MakeOnceASecondPolicy(uint32_t scans_per_second);
std::unique_ptr<SendPolicy> MakeSkipIfDirtyPolicy(PageCount pages);

}  // namespace presync
