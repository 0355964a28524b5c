#include "qemu-glue/guest_notes.h"

#include <unistd.h>

#include <cstdio>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <optional>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "qemu-glue/qmp/json_read.h"

namespace presync {

void WriteGuestNote(const GuestNote& note) {
  const Json json = {{"pid", note.pid},
                     {"start_ticks", note.start_ticks},
                     {"qmp", note.qmp},
                     {"files", note.files}};
  // A reader finds the old one or the new one, never half of it. Its name ends otherwise meanwhile.
  const std::string next = note.path + ".new";
  std::ofstream(next) << ToText(json) << "\n";
  if (::rename(next.c_str(), note.path.c_str()) != 0) ::unlink(next.c_str());
}

std::vector<GuestNote> ReadGuestNotes(const std::string& folder) {
  std::vector<GuestNote> notes;
  std::error_code error;
  for (const auto& file : std::filesystem::directory_iterator(folder, error)) {
    if (file.path().extension() != ".guest") continue;
    std::ifstream in(file.path());
    const Json json = Json::parse(in, nullptr, false);
    const std::optional<uint64_t> pid = UintAt(json, "pid");
    if (!pid || *pid == 0 || *pid > INT32_MAX) continue;
    GuestNote note = {.path = file.path(),
                      .pid = static_cast<pid_t>(*pid),
                      .start_ticks = UintAt(json, "start_ticks").value_or(0),
                      .qmp = StringAt(json, "qmp"),
                      .files = {}};
    if (const Json* files = FindMember(json, "files"); files != nullptr && files->is_array()) {
      for (const Json& path : *files) {
        if (path.is_string()) note.files.push_back(path.get<std::string>());
      }
    }
    notes.push_back(std::move(note));
  }
  return notes;
}

bool IsAlive(const GuestNote& note) { return IsAlive(note.pid, note.start_ticks); }

bool IsAlive(pid_t pid, uint64_t start_ticks) {
  std::ifstream in(absl::StrCat("/proc/", pid, "/stat"));
  const std::string stat((std::istreambuf_iterator<char>(in)), std::istreambuf_iterator<char>());
  // Fields from the third on follow the command's name, which is in parentheses: proc(5).
  const size_t name_end = stat.rfind(')');
  if (name_end == std::string::npos) return false;
  const std::vector<std::string> fields =
      absl::StrSplit(stat.substr(name_end + 1), ' ', absl::SkipEmpty());
  constexpr size_t kState = 0;
  constexpr size_t kStartTime = 22 - 3;
  return fields.size() > kStartTime && fields[kState] != "Z" &&
         fields[kStartTime] == absl::StrCat(start_ticks);
}

}  // namespace presync
