#include "qemu-glue/guest_notes.h"

#include <filesystem>
#include <optional>
#include <utility>

#include "absl/strings/str_cat.h"
#include "qemu-glue/process_identity.h"
#include "qemu-glue/qmp/json_read.h"
#include "qemu-glue/target_files.h"
#include "transport/sync/target_host.h"

namespace presync {
namespace {

constexpr size_t kMostRegions = 1024;

std::vector<std::string> ReadRegions(const Json& json) {
  std::vector<std::string> regions;
  const Json* names = FindMember(json, "regions");
  if (names == nullptr || !names->is_array() || names->size() > kMostRegions) return {};
  for (const Json& name : *names) {
    if (!name.is_string()) continue;
    const std::string text = name.get<std::string>();
    if (IsPlainName(text)) regions.push_back(text);
  }
  return regions;
}

}  // namespace

GuestPaths MakePaths(const std::string& run_folder, const std::string& ram_folder,
                     const std::string& guest, const std::vector<std::string>& regions) {
  const std::string base = absl::StrCat(run_folder, "/", guest);
  GuestPaths paths = {.folder = base + ".d",
                      .qmp = base + ".d/qmp",
                      .glue = base + ".d/glue",
                      .qmp_before = base + ".qmp",
                      .glue_before = base + ".glue",
                      .log = base + ".log",
                      .note = base + ".guest",
                      .copy = base + ".copy",
                      .ram = {}};
  for (const std::string& region : regions) {
    paths.ram.push_back(absl::StrCat(ram_folder, "/", guest, ".", region, ".ram"));
  }
  return paths;
}

absl::Status WriteGuestNote(const std::string& folder, const GuestNote& note) {
  const Json json = {{"pid", note.pid},
                     {"start_ticks", note.start_ticks},
                     {"uid", note.uid},
                     {"qmp", note.qmp},
                     {"regions", note.regions}};
  return ReplaceFile(MakePaths(folder, "", note.guest, {}).note, ToText(json) + "\n");
}

std::vector<GuestNote> ReadGuestNotes(const std::string& folder) {
  std::vector<GuestNote> notes;
  std::error_code error;
  for (const auto& file : std::filesystem::directory_iterator(folder, error)) {
    const std::string guest = file.path().stem();
    if (file.path().extension() != ".guest" || !IsPlainName(guest)) continue;
    const Json json = Json::parse(ReadSmallFile(file.path()), nullptr, false);
    const std::optional<uint64_t> pid = UintAt(json, "pid");
    if (!pid || *pid == 0 || *pid > INT32_MAX) continue;
    const GuestPaths paths = MakePaths(folder, "", guest, {});
    notes.push_back({.guest = guest,
                     .pid = static_cast<pid_t>(*pid),
                     .start_ticks = UintAt(json, "start_ticks").value_or(0),
                     .uid = static_cast<uid_t>(UintAt(json, "uid").value_or(0)),
                     .qmp = StringAt(json, "qmp") == paths.qmp ? paths.qmp : paths.qmp_before,
                     .regions = ReadRegions(json)});
  }
  return notes;
}

bool IsAlive(const GuestNote& note) { return IsAlive(note.pid, note.start_ticks); }

}  // namespace presync
