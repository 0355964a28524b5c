#include "qemu-glue/copy_note.h"

#include <sys/stat.h>
#include <unistd.h>

#include <filesystem>
#include <optional>
#include <utility>

#include "absl/strings/str_cat.h"
#include "qemu-glue/process_identity.h"
#include "qemu-glue/qmp/json_read.h"
#include "qemu-glue/target_files.h"

namespace presync {
namespace {

std::optional<CopiedFile> ParseFile(const Json& json) {
  CopiedFile file = {.region = {.name = StringAt(json, "region"),
                                .size_bytes = UintAt(json, "size_bytes").value_or(0)},
                     .path = StringAt(json, "path"),
                     .device = UintAt(json, "device").value_or(0),
                     .inode = UintAt(json, "inode").value_or(0)};
  if (!IsPlainName(file.region.name) || file.region.size_bytes == 0 || file.inode == 0) return {};
  return file;
}

std::optional<CopyNote> Parse(const Json& json) {
  const std::optional<uint64_t> pid = UintAt(json, "holder_pid");
  const absl::StatusOr<SessionId> session = IdFromHex(StringAt(json, "session"));
  const Json* files = FindMember(json, "files");
  if (!IsPlainName(StringAt(json, "guest")) || !pid || *pid == 0 || *pid > INT32_MAX ||
      !session.ok() || files == nullptr || !files->is_array() || files->empty()) {
    return {};
  }
  CopyNote note;
  note.owner = {.guest = StringAt(json, "guest"),
                .session = *session,
                .peer = StringAt(json, "peer"),
                .peer_name = StringAt(json, "peer_name")};
  note.holder_pid = static_cast<pid_t>(*pid);
  note.holder_start_ticks = UintAt(json, "holder_start_ticks").value_or(0);
  for (const Json& each : *files) {
    std::optional<CopiedFile> file = ParseFile(each);
    if (!file) return {};
    note.files.push_back(*std::move(file));
  }
  return note;
}

}  // namespace

std::vector<CopiedFile> FilesOf(const GuestMemory& memory) {
  std::vector<CopiedFile> files;
  for (const Region& region : memory.regions()) {
    struct stat st = {};
    ::fstat(region.fd(), &st);
    files.push_back({.region = {.name = region.name(), .size_bytes = region.size_bytes()},
                     .path = region.path(),
                     .device = st.st_dev,
                     .inode = st.st_ino});
  }
  return files;
}

absl::Status WriteCopyNote(const std::string& path, const CopyOwner& owner,
                           std::vector<CopiedFile> files) {
  Json json = {{"guest", owner.guest},     {"session", IdToHex(owner.session)},
               {"peer", owner.peer},       {"peer_name", owner.peer_name},
               {"holder_pid", ::getpid()}, {"holder_start_ticks", StartTicks(::getpid())},
               {"files", Json::array()}};
  for (const CopiedFile& file : files) {
    json["files"].push_back({{"region", file.region.name},
                             {"size_bytes", file.region.size_bytes},
                             {"path", file.path},
                             {"device", file.device},
                             {"inode", file.inode}});
  }
  // Not synced to a disk: a crash of the host takes the memory along.
  return ReplaceFile(path, ToText(json) + "\n");
}

std::vector<CopyNote> ReadCopyNotes(const std::string& folder) {
  std::vector<CopyNote> notes;
  std::error_code error;
  for (const auto& file : std::filesystem::directory_iterator(folder, error)) {
    if (file.path().extension() != ".copy") continue;
    std::optional<CopyNote> note = Parse(Json::parse(ReadSmallFile(file.path()), nullptr, false));
    if (!note) continue;
    note->path = file.path();
    notes.push_back(*std::move(note));
  }
  return notes;
}

}  // namespace presync
