// What a sync was started with, for the presyncd that comes after this one, which starts it again:
// docs/protocol.md, "Going on".
//
// A file NAME.sync in presyncd's state folder: a line of JSON, so that `cat` shows it, and a line
// with its checksum. Replaced as a whole, so that there is always a whole one, or none.
#pragma once

#include <nlohmann/json.hpp>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "qemu-glue/process_identity.h"

namespace presync {

struct SyncNote {
  std::string guest;
  nlohmann::json order;  // as SyncOrder
  // The QEMU. A sync is of this one process: another one that answers at its monitor later is
  // another guest, as far as anybody knows.
  ProcessIdentity qemu;
};

// What a `start` request says, and nothing else: the same for two that ask for the same.
nlohmann::json SyncOrder(const nlohmann::json& request);

// INVALID_ARGUMENT: too long to be read again.
absl::StatusOr<std::string> EncodeSyncNote(const SyncNote& note);
// INVALID_ARGUMENT: not whole, not a note, or of a version that this presyncd does not know.
absl::StatusOr<SyncNote> ParseSyncNote(absl::string_view bytes);

// The notes in one folder. One thread at a time.
class SyncNotes {
 public:
  explicit SyncNotes(std::string folder) : folder_(std::move(folder)) {}

  // Where the note of a guest lies. Different guests have different ones.
  std::string PathOf(const std::string& guest) const;

  // Replaces the guest's note. Durable on return. UNAVAILABLE: the file system's own words; the
  // earlier one may still be there. INVALID_ARGUMENT.
  absl::Status Write(const SyncNote& note);

  // Durable on return. Ok if there is none. UNAVAILABLE: it is still there.
  absl::Status Remove(const std::string& guest);

  // All of them. What can't be read is named in `*unreadable`, with the reason, and stays.
  std::vector<SyncNote> ReadAll(std::vector<std::string>* unreadable);

 private:
  const std::string folder_;
  std::set<std::string> there_;  // guests that may have one
};

}  // namespace presync
