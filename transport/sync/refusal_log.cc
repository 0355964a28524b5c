#include "transport/sync/refusal_log.h"

#include <iterator>
#include <vector>

#include "absl/strings/str_cat.h"

namespace presync {

void RefusalLog::Refuse(const std::string& who, const std::string& why, absl::Time now) {
  std::string line;
  {
    MutexLock lock(&mutex_);
    auto key = std::make_pair(who, why);
    auto it = kinds_.find(key);
    if (it == kinds_.end() && kinds_.size() >= kMaxKinds) {
      key = {"others", "too many kinds of refusals to tell them all"};
      it = kinds_.find(key);
    }
    if (it != kinds_.end()) {
      ++it->second.again;
      return;
    }
    kinds_[key] = {.said = now};
    line = absl::StrCat("refused ", key.first, ": ", key.second);
  }
  sink_(line);
}

void RefusalLog::Flush(absl::Time now) {
  std::vector<std::string> lines;
  {
    MutexLock lock(&mutex_);
    for (auto it = kinds_.begin(); it != kinds_.end();) {
      const auto next = std::next(it);
      if (now - it->second.said >= quiet_) {
        if (it->second.again > 0) {
          lines.push_back(absl::StrCat("refused ", it->first.first, " ", it->second.again,
                                       " more times within ", absl::FormatDuration(quiet_), ": ",
                                       it->first.second));
        }
        kinds_.erase(it);
      }
      it = next;
    }
  }
  for (const std::string& line : lines) sink_(line);
}

}  // namespace presync
