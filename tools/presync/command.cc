#include "tools/presync/command.h"

#include <cstdio>
#include <filesystem>
#include <utility>

#include "absl/strings/str_cat.h"
#include "tools/common/local_api.h"
#include "transport/clock.h"
#include "transport/printable.h"

namespace presync {
namespace {

// What presyncd tells has others' words in it: guests', QEMUs', peers'.
void MakePrintable(nlohmann::json* json) {
  if (json->is_string()) *json = PrintableText(json->get_ref<std::string&>(), kMaxLocalLineBytes);
  for (auto& element : *json) {
    if (json->is_structured()) MakePrintable(&element);
  }
}

}  // namespace

int Fail(const absl::Status& status, const CommandContext& context, ExitCode code) {
  if (context.json) std::printf("%s\n", StatusToJson(status).dump().c_str());
  std::fprintf(stderr, "presync: %s\n", std::string(status.message()).c_str());
  return code;
}

int Interrupted(const std::string& goes_on, const CommandContext& context) {
  return Fail(absl::CancelledError(absl::StrCat("no longer waiting; ", goes_on)), context,
              kInterrupted);
}

Answer Ask(const CommandContext& context, const nlohmann::json& request, absl::Duration longest,
           const std::string& goes_on) {
  absl::StatusOr<nlohmann::json> json = CallLocal(context.socket, request, MonotonicNow() + longest,
                                                  goes_on.empty() ? nullptr : &context.interrupted);
  if (absl::IsCancelled(json.status())) return {{}, Interrupted(goes_on, context)};
  if (!json.ok()) return {{}, Fail(json.status(), context, kNoDaemon)};
  MakePrintable(&*json);
  if (absl::Status s = JsonToStatus(*json); !s.ok()) return {{}, Fail(s, context)};
  return {*std::move(json)};
}

int Print(const Answer& answer, const CommandContext& context,
          std::string (*render)(const nlohmann::json&)) {
  if (answer.exit_code != kOk) return answer.exit_code;
  std::printf("%s\n", context.json ? answer.json.dump().c_str() : render(answer.json).c_str());
  return kOk;
}

std::string AbsolutePath(const std::string& path) {
  return path.empty() ? path : std::filesystem::absolute(path).string();
}

}  // namespace presync
