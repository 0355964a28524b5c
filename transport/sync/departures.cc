#include "transport/sync/departures.h"

#include <errno.h>
#include <fcntl.h>
#include <unistd.h>

#include <cstdio>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <utility>

#include "absl/status/statusor.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/time/time.h"
#include "transport/unique_fd.h"

namespace presync {
namespace {

constexpr char kExtension[] = ".left";

absl::Status FileError(absl::string_view what, const std::string& path) {
  return absl::UnavailableError(
      absl::StrCat("note of a guest that left: ", what, " ", path, ": ", std::strerror(errno)));
}

absl::Status SyncFolder(const std::string& folder) {
  const UniqueFd dir(::open(folder.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  if (!dir.valid() || ::fsync(dir.get()) != 0) return FileError("sync", folder);
  return absl::OkStatus();
}

absl::Status WriteWhole(const std::string& path, absl::string_view bytes) {
  ::unlink(path.c_str());  // one that was left half-written
  const UniqueFd fd(
      ::open(path.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC | O_NOFOLLOW, 0600));
  if (!fd.valid()) return FileError("make", path);
  if (::write(fd.get(), bytes.data(), bytes.size()) != static_cast<ssize_t>(bytes.size()) ||
      ::fsync(fd.get()) != 0) {
    return FileError("write", path);
  }
  return absl::OkStatus();
}

struct NotedDeparture {
  std::string path;
  absl::StatusOr<HandoverEntry> entry;
};

std::vector<NotedDeparture> ReadNotes(const std::string& folder) {
  std::vector<NotedDeparture> notes;
  std::error_code error;
  for (const auto& file : std::filesystem::directory_iterator(folder, error)) {
    const std::string path = file.path();
    if (!absl::EndsWith(path, kExtension)) continue;
    std::ifstream in(path, std::ios::binary);
    const std::string bytes((std::istreambuf_iterator<char>(in)), std::istreambuf_iterator<char>());
    notes.push_back({path, HandoverRecord::Parse(bytes)});
  }
  return notes;
}

absl::Status ForgetBut(const std::string& folder, const std::string& guest,
                       const std::string& but) {
  bool removed = false;
  for (const NotedDeparture& note : ReadNotes(folder)) {
    if (!note.entry.ok() || note.entry->guest != guest || note.path == but) continue;
    if (::unlink(note.path.c_str()) != 0 && errno != ENOENT) return FileError("remove", note.path);
    removed = true;
  }
  return removed ? SyncFolder(folder) : absl::OkStatus();
}

}  // namespace

std::string DeparturePath(const std::string& folder, const HandoverEntry& entry) {
  const std::string record = HandoverRecord::Path(folder, entry);
  return record.substr(0, record.rfind('.')) + kExtension;
}

absl::Status NoteDeparture(const std::string& folder, const HandoverEntry& entry) {
  HandoverEntry left = entry;
  left.phase = HandoverPhase::kMoved;
  left.at = NowInBoot();
  const absl::StatusOr<std::string> block = HandoverRecord::Encode(left);
  if (!block.ok()) return block.status();
  const std::string path = DeparturePath(folder, left);
  const std::string next = path + "-new";
  absl::Status written = WriteWhole(next, *block);
  if (written.ok() && ::rename(next.c_str(), path.c_str()) != 0) written = FileError("make", path);
  if (written.ok()) written = SyncFolder(folder);
  if (!written.ok()) {
    ::unlink(next.c_str());
    return written;
  }
  return ForgetBut(folder, entry.guest, path);
}

absl::Status ForgetDeparture(const std::string& folder, const std::string& guest) {
  return ForgetBut(folder, guest, "");
}

std::vector<HandoverEntry> ReadDepartures(const std::string& folder,
                                          std::vector<std::string>* unreadable) {
  std::vector<HandoverEntry> departures;
  for (NotedDeparture& note : ReadNotes(folder)) {
    if (note.entry.ok()) {
      departures.push_back(*std::move(note.entry));
    } else {
      unreadable->push_back(note.path);
    }
  }
  return departures;
}

absl::Status CheckMayStart(const std::string& folder, const std::string& guest) {
  std::vector<std::string> unreadable;
  const auto refuse = [&guest](const std::string& why) {
    return absl::FailedPreconditionError(absl::StrCat(guest, " must not be started here: ", why));
  };
  for (const HandoverEntry& entry : HandoverRecord::ReadAll(folder, &unreadable)) {
    if (entry.guest != guest || entry.role != HandoverRole::kSource) continue;
    if (entry.phase != HandoverPhase::kGivenUp && entry.phase != HandoverPhase::kMoved) continue;
    return refuse(absl::StrCat("it was handed over to ", entry.peer,
                               ", and that is not settled: presync status says what to do"));
  }
  for (const HandoverEntry& entry : ReadDepartures(folder, &unreadable)) {
    if (entry.guest != guest) continue;
    return refuse(absl::StrCat("it moved to ", entry.peer,
                               ", and runs there, or wherever it went on to. If it certainly runs "
                               "nowhere any more: presync may-start ",
                               guest, " --clear"));
  }
  for (const std::string& path : unreadable) {
    if (!HandoverRecord::MayBeOf(path, guest)) continue;
    return refuse(absl::StrCat(path, " can't be read: look where the guest runs, then remove it"));
  }
  return absl::OkStatus();
}

}  // namespace presync
