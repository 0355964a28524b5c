#include "tools/presyncd/recording_api.h"

#include <string>

#include "absl/strings/str_cat.h"
#include "tools/common/local_api.h"

namespace presync {
namespace {

using Json = nlohmann::json;

// A run takes at most 22 bytes of JSON ("4294967295,4294967295"), a scan's end 7: half of what an
// answer may be long.
constexpr size_t kMaxRunsAnAnswer = 20'000;

Json ToJson(const RecordedPart& part) {
  Json runs = Json::array();
  for (const PageRun& run : part.runs) {
    runs.push_back(run.first);
    runs.push_back(run.count);
  }
  return {{"runs", std::move(runs)},
          {"ends", part.ends},
          {"missed_scans", part.missed},
          {"ended", part.ended},
          {"problem", part.problem}};
}

}  // namespace

absl::StatusOr<Json> AnswerRecord(SessionRecording* recording, PageCount pages,
                                  const Json& request) {
  const std::string action = TextOr(request, "action", "");
  if (action == "start") {
    const absl::Duration interval = absl::Microseconds(NumberOr(request, "interval_us", 100'000));
    if (absl::Status s = recording->Start(interval); !s.ok()) return s;
    return Json{{"pages", pages}, {"page_bytes", kPageBytes}};
  }
  if (action == "take") {
    absl::StatusOr<RecordedPart> part = recording->Take(kMaxRunsAnAnswer);
    if (!part.ok()) return part.status();
    return ToJson(*part);
  }
  if (action == "stop") {
    if (absl::Status s = recording->Stop(); !s.ok()) return s;
    return Json::object();
  }
  return absl::InvalidArgumentError(absl::StrCat(
      "'", action, "' is nothing to do with a recording; there are start, take and stop"));
}

}  // namespace presync
