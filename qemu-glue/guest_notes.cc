#include "qemu-glue/guest_notes.h"

#include <filesystem>
#include <fstream>
#include <optional>
#include <utility>

#include "qemu-glue/process_identity.h"
#include "qemu-glue/qmp/json_read.h"
#include "qemu-glue/target_files.h"

namespace presync {

absl::Status WriteGuestNote(const GuestNote& note) {
  const Json json = {{"pid", note.pid},
                     {"start_ticks", note.start_ticks},
                     {"qmp", note.qmp},
                     {"files", note.files}};
  return ReplaceFile(note.path, ToText(json) + "\n");
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

}  // namespace presync
