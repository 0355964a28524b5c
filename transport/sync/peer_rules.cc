#include "transport/sync/peer_rules.h"

#include <stdlib.h>
#include <unistd.h>

#include <algorithm>
#include <climits>
#include <memory>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"

namespace presync {
namespace {

bool Matches(const std::string& pattern, const std::string& name) {
  if (absl::EndsWith(pattern, "*")) {
    return absl::StartsWith(name, pattern.substr(0, pattern.size() - 1));
  }
  return pattern == name;
}

// Where an open file lies. Empty: its name is gone.
std::string PathOf(int fd) {
  char path[PATH_MAX];
  const ssize_t n = ::readlink(absl::StrCat("/proc/self/fd/", fd).c_str(), path, sizeof(path));
  const std::string found(path, n > 0 ? static_cast<size_t>(n) : 0);
  return absl::EndsWith(found, " (deleted)") ? "" : found;
}

std::string Resolved(const std::string& folder) {
  const std::unique_ptr<char, void (*)(void*)> real(::realpath(folder.c_str(), nullptr), ::free);
  return real == nullptr ? "" : real.get();
}

bool LiesIn(const std::string& path, const std::string& folder) {
  return !folder.empty() && (folder == "/" || absl::StartsWith(path, folder + "/"));
}

}  // namespace

const PeerRules* FindRules(const PeerList& list, const std::string& peer) {
  static const PeerRules kNone;
  if (!list.has_value()) return &kNone;
  const auto it = list->find(peer);
  return it == list->end() ? nullptr : &it->second;
}

absl::Status CheckRules(const PeerRules& rules, const PeerUse& use, const std::string& guest,
                        uint64_t bytes, const std::string& whose) {
  const bool named = std::any_of(rules.guests.begin(), rules.guests.end(),
                                 [&](const std::string& p) { return Matches(p, guest); });
  if (!rules.guests.empty() && !named) {
    return absl::PermissionDeniedError(
        absl::StrCat("guest ", guest, " may not come from ", whose, "; its list has ",
                     absl::StrJoin(rules.guests, ", "), " (guests, in presyncd.toml)"));
  }
  if (rules.max_guests != 0 && use.guests >= rules.max_guests) {
    return absl::ResourceExhaustedError(
        absl::StrCat(use.guests, " guests of ", whose, " are mirrored here, which is as many as ",
                     "may be at a time (max_guests, in presyncd.toml)"));
  }
  if (rules.max_memory_bytes != 0 &&
      bytes > rules.max_memory_bytes - std::min(use.memory_bytes, rules.max_memory_bytes)) {
    return absl::ResourceExhaustedError(
        absl::StrCat("guest ", guest, " has ", bytes >> 20, " MiB; guests of ", whose, " take ",
                     use.memory_bytes >> 20, " of the ", rules.max_memory_bytes >> 20,
                     " MiB that they may here (max_memory, in presyncd.toml)"));
  }
  return absl::OkStatus();
}

absl::Status CheckFolders(const PeerRules& rules, const GuestMemory& memory) {
  if (rules.folders.empty()) return absl::OkStatus();
  for (const Region& region : memory.regions()) {
    const std::string path = PathOf(region.fd());
    const bool allowed =
        std::any_of(rules.folders.begin(), rules.folders.end(),
                    [&](const std::string& folder) { return LiesIn(path, Resolved(folder)); });
    if (allowed) continue;
    return absl::PermissionDeniedError(
        absl::StrCat("the memory ", region.name(), " of this guest would be in ",
                     path.empty() ? "a file without a name" : path, "; this peer's may be in ",
                     absl::StrJoin(rules.folders, ", "), " only (folders, in presyncd.toml)"));
  }
  return absl::OkStatus();
}

}  // namespace presync
