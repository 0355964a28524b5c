#include "transport/sync/departures.h"

#include <errno.h>
#include <unistd.h>

#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <utility>

#include "absl/status/statusor.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/time/time.h"
#include "transport/durable_file.h"

namespace presync {
namespace {

constexpr char kExtension[] = ".left";

constexpr char kWhat[] = "note of a guest that left";

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
    if (::unlink(note.path.c_str()) != 0 && errno != ENOENT) {
      return absl::UnavailableError(
          absl::StrCat(kWhat, ": remove ", note.path, ": ", std::strerror(errno)));
    }
    removed = true;
  }
  return removed ? SyncFolder(kWhat, folder) : absl::OkStatus();
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
  if (absl::Status s = ReplaceWhole(kWhat, path, path + "-new", *block); !s.ok()) return s;
  if (absl::Status s = SyncFolder(kWhat, folder); !s.ok()) return s;
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
