#include "tools/presyncd/sync_note.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>
#include <xxhash.h>

#include <cerrno>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <utility>

#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "tools/common/local_api.h"
#include "transport/durable_file.h"
#include "transport/json.h"

namespace presync {
namespace {

using Json = nlohmann::json;

constexpr int64_t kVersion = 1;
constexpr char kExtension[] = ".sync";
constexpr char kNewExtension[] = ".sync-new";
// An order has a handful of paths and names.
constexpr size_t kMostBytes = 64 << 10;
// Of a file's name; a guest's is 128 bytes at most.
constexpr size_t kMostNameBytes = 200;

constexpr const char* kTexts[] = {"qmp",           "domain",      "glue",        "to",
                                  "transport",     "dirty_log",   "compression", "max_launch_time",
                                  "max_bandwidth", "rdma_devices"};

std::string Checksum(absl::string_view text) {
  return absl::StrFormat("%016x", XXH3_64bits(text.data(), text.size()));
}

constexpr char kWhat[] = "note of a sync";

absl::Status FileError(absl::string_view step, const std::string& path) {
  return absl::UnavailableError(
      absl::StrCat(kWhat, ": ", step, " ", path, ": ", std::strerror(errno)));
}

absl::StatusOr<std::string> ReadWhole(const std::string& path) {
  std::ifstream in(path, std::ios::binary);
  if (!in.is_open()) return FileError("open", path);
  std::string bytes(kMostBytes + 1, '\0');
  in.read(bytes.data(), static_cast<std::streamsize>(bytes.size()));
  if (in.bad()) return FileError("read", path);
  bytes.resize(static_cast<size_t>(in.gcount()));
  return bytes;
}

absl::Status NotANote(absl::string_view why) { return absl::InvalidArgumentError(why); }

}  // namespace

Json SyncOrder(const Json& request) {
  Json order = Json::object();
  for (const char* key : kTexts) {
    if (std::string text = TextOr(request, key, ""); !text.empty()) order[key] = std::move(text);
  }
  if (const int64_t pairs = NumberOr(request, "rdma_queue_pairs", 0); pairs != 0) {
    order["rdma_queue_pairs"] = pairs;
  }
  // A domain's name and monitor are libvirt's to say, each time anew.
  if (order.contains("domain")) {
    order.erase("qmp");
  } else if (std::string name = TextOr(request, "name", ""); !name.empty()) {
    order["name"] = std::move(name);
  }
  return order;
}

absl::StatusOr<std::string> EncodeSyncNote(const SyncNote& note) {
  const Json json = {{"version", kVersion},
                     {"guest", note.guest},
                     {"order", note.order},
                     {"qemu_pid", note.qemu.pid},
                     {"qemu_start_ticks", note.qemu.start_ticks},
                     {"boot", note.qemu.boot}};
  std::string bytes = json.dump(-1, ' ', true, Json::error_handler_t::replace) + "\n";
  absl::StrAppend(&bytes, Checksum(bytes), "\n");
  if (bytes.size() > kMostBytes) return NotANote("what the sync was started with is too long");
  return bytes;
}

absl::StatusOr<SyncNote> ParseSyncNote(absl::string_view bytes) {
  const size_t end = bytes.find('\n');
  if (bytes.size() > kMostBytes || end == absl::string_view::npos) return NotANote("not whole");
  const absl::string_view text = bytes.substr(0, end + 1);
  if (bytes.substr(end + 1) != absl::StrCat(Checksum(text), "\n")) {
    return NotANote("its checksum is wrong: it is not whole, or was changed");
  }
  const Json json = ParseJson({text.data(), text.size()});
  if (!json.is_object()) return NotANote("not a note of a sync");
  if (const int64_t version = NumberOr(json, "version", 0); version != kVersion) {
    return NotANote(absl::StrCat("it is of version ", version, ", this presyncd knows ", kVersion));
  }
  const int64_t pid = NumberOr(json, "qemu_pid", 0);
  const int64_t ticks = NumberOr(json, "qemu_start_ticks", 0);
  SyncNote note = {.guest = TextOr(json, "guest", ""),
                   .order = SyncOrder(json.value("order", Json::object())),
                   .qemu = {.boot = TextOr(json, "boot", "")}};
  if (pid > 0 && pid <= INT32_MAX && ticks > 0) {
    note.qemu.pid = static_cast<pid_t>(pid);
    note.qemu.start_ticks = static_cast<uint64_t>(ticks);
  }
  const bool reaches = note.order.contains("domain") || note.order.contains("qmp");
  if (note.guest.empty() || !note.qemu.known() || !reaches || !note.order.contains("to")) {
    return NotANote("something is missing in it");
  }
  return note;
}

// What a file's name may not hold is written as =XX: no two guests share a file.
std::string SyncNotes::PathOf(const std::string& guest) const {
  std::string name;
  for (const char c : guest) {
    const auto byte = static_cast<unsigned char>(c);
    const bool plain =
        absl::ascii_isalnum(byte) || c == '-' || c == '_' || (c == '.' && !name.empty());
    if (plain) {
      name.push_back(c);
    } else {
      absl::StrAppendFormat(&name, "=%02x", byte);
    }
  }
  return absl::StrCat(folder_, "/", name, kExtension);
}

absl::Status SyncNotes::Write(const SyncNote& note) {
  absl::StatusOr<std::string> bytes = EncodeSyncNote(note);
  if (!bytes.ok()) return bytes.status();
  const std::string path = PathOf(note.guest);
  if (path.size() - folder_.size() > kMostNameBytes)
    return NotANote("the guest's name is too long");
  const std::string next =
      absl::StrCat(path.substr(0, path.size() - std::strlen(kExtension)), kNewExtension);
  if (absl::Status s = ReplaceWhole(kWhat, path, next, *bytes); !s.ok()) return s;
  there_.insert(note.guest);
  return SyncFolder(kWhat, folder_);
}

absl::Status SyncNotes::Remove(const std::string& guest) {
  if (!there_.contains(guest)) return absl::OkStatus();
  const std::string path = PathOf(guest);
  if (::unlink(path.c_str()) != 0 && errno != ENOENT) return FileError("remove", path);
  if (absl::Status s = SyncFolder(kWhat, folder_); !s.ok()) return s;
  there_.erase(guest);
  return absl::OkStatus();
}

std::vector<SyncNote> SyncNotes::ReadAll(std::vector<std::string>* unreadable) {
  std::vector<SyncNote> notes;
  std::error_code error;
  for (const auto& file : std::filesystem::directory_iterator(folder_, error)) {
    const std::string path = file.path();
    if (absl::EndsWith(path, kNewExtension)) ::unlink(path.c_str());
    if (!absl::EndsWith(path, kExtension)) continue;
    const absl::StatusOr<std::string> bytes = ReadWhole(path);
    absl::StatusOr<SyncNote> note = bytes.ok() ? ParseSyncNote(*bytes) : bytes.status();
    if (note.ok() && PathOf(note->guest) != path) {
      note = NotANote(absl::StrCat("it is of the guest ", note->guest, ", and not in its place"));
    }
    if (!note.ok()) {
      unreadable->push_back(absl::StrCat(path, ": ", note.status().message()));
      continue;
    }
    there_.insert(note->guest);
    notes.push_back(*std::move(note));
  }
  if (error) unreadable->push_back(absl::StrCat(folder_, ": ", error.message()));
  return notes;
}

}  // namespace presync
