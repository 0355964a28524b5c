#include "predictor/policy.h"

#include <algorithm>
#include <string>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "predictor/history_policies.h"
#include "predictor/learned_policy.h"
#include "predictor/page_history.h"
#include "predictor/simple_policies.h"

namespace presync {

absl::StatusOr<std::unique_ptr<SendPolicy>> MakePolicy(std::string_view name, PageCount pages,
                                                       const PolicyOptions& options) {
  const uint32_t max_streak = options.max_back_off_log2;
  // Debian builds abseil for C++14, where absl::string_view is not std::string_view: hence the
  // strings.
  const std::string title = absl::StrCat("make send policy \"", std::string(name), "\": ");
  if (max_streak > PageHistory::kMaxStreak) {
    return absl::InvalidArgumentError(absl::StrCat(title, "arming back-off of up to 2^", max_streak,
                                                   " scans; the most is 2^",
                                                   uint32_t{PageHistory::kMaxStreak}));
  }
  if (options.scans_per_second == 0) {
    return absl::InvalidArgumentError(absl::StrCat(title, "0 scans in a second"));
  }
  if (name == "learned") return MakeLearnedPolicy(pages, max_streak);
  if (name == "ewma") return MakeEwmaPolicy(pages, max_streak);
  if (name == "oldest") return MakeOldestPolicy(pages, max_streak);
  if (name == "skip-if-dirty") return MakeSkipIfDirtyPolicy(pages);
  if (name == "once-a-second") return MakeOnceASecondPolicy(options.scans_per_second);
  if (name == "every-scan") return MakeEveryScanPolicy();
  std::string known;
  for (std::string_view each : PolicyNames()) {
    absl::StrAppend(&known, known.empty() ? "" : ", ", std::string(each));
  }
  return absl::InvalidArgumentError(absl::StrCat(title, "no such policy; there are ", known));
}

std::vector<std::string_view> PolicyNames() {
  return {"learned", "ewma", "oldest", "skip-if-dirty", "once-a-second", "every-scan"};
}

}  // namespace presync
