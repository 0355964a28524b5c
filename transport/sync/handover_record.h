// The durable record of one handover, kept on both hosts: who may run the guest, whatever crashes.
//
// A file NAME.SESSION.source or .target of 4096-byte blocks in presyncd's state folder. Each entry
// is one block: a line of JSON padded with spaces, so that `cat` shows it, with a checksum, so that
// a torn write is not believed. The last whole block counts. All blocks are allocated before the
// guest stops: an entry costs one fdatasync and no file system metadata.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "transport/sync/session_id.h"
#include "transport/unique_fd.h"

namespace presync {

enum class HandoverRole { kSource, kTarget };

enum class HandoverPhase {
  // On the source:
  kPreparing,  // the guest is the source's
  kGivenUp,    // the target may run it; the source must not, unless the target says that it never
               // will
  kMoved,      // the target runs it
  kTakenBack,  // the target never ran it: the source's again
  // On the target:
  kWaiting,    // the guest is the source's
  kToldToRun,  // the guest is the target's
  kRunning,    // the same, and it ran
  kNeverRan,   // it never ran here and never will by this session
  kRanUntold,  // nobody told it to run, and yet it was seen to run here: what a person has to know
};

absl::string_view PhaseName(HandoverPhase phase);

// Whether nothing is open any more about a handover that got so far.
bool IsSettled(HandoverPhase phase);

// Whether an entry may follow the newest one, if there is one. What was said for good is never
// taken back: a guest that ran never becomes one that never ran.
bool CanFollow(std::optional<HandoverPhase> from, HandoverPhase to);

// A moment that no step of the wall clock moves: since when this host is up, and which boot it was.
struct BootMoment {
  std::string boot;  // the kernel's id; empty: not known
  int64_t uptime_s = 0;
};
BootMoment NowInBoot();

struct HandoverEntry {
  HandoverRole role = HandoverRole::kSource;
  HandoverPhase phase = HandoverPhase::kPreparing;
  std::string guest;
  SessionId session = {};
  std::string peer;       // the other host, for people
  std::string peer_name;  // the name in its certificate; empty: it showed none, or is a target
  std::string detail;     // how to reach the guest's QEMU here (its QMP socket), for recovery
  // Which process that is, in the words of whoever opened it (FormatProcess); empty: not known, as
  // in the records of older presyncds. An address may be another process's by now.
  std::string process;
  // Handovers of this host in the order in which they were begun; 0: of an older presyncd.
  uint64_t sequence = 0;
  BootMoment at = {};  // when it was written
};

// One writer, not thread-safe.
class HandoverRecord {
 public:
  // Creates (or continues) the record of `entry.session` in `folder`, with room for entries, so
  // that Append has only one block to write; adds none yet (`entry.phase` does not count). The
  // folder must exist. Durable on return. UNAVAILABLE: the file system's own words.
  static absl::StatusOr<HandoverRecord> Reserve(const std::string& folder, HandoverEntry entry);

  // The same with `entry` as its newest entry.
  static absl::StatusOr<HandoverRecord> Open(const std::string& folder, HandoverEntry entry);

  // Adds an entry with this phase. Durable on return. UNAVAILABLE: it may or may not be on disk.
  // FAILED_PRECONDITION: it can't follow the newest one, or somebody else has written since; then
  // nothing was changed.
  absl::Status Append(HandoverPhase phase);

  // Which process the entries from now on are about.
  void set_process(std::string process) { entry_.process = std::move(process); }

  // Whether it has an entry; one that has none says nothing about the guest.
  bool used() const { return blocks_ > 0; }

  const HandoverEntry& entry() const { return entry_; }
  const std::string& path() const { return path_; }

  // The newest entry of the record of `entry.session` as it is now. NOT_FOUND: there is none, or it
  // has no entry; else as Parse.
  static absl::StatusOr<HandoverEntry> Read(const std::string& folder, const HandoverEntry& entry);

  // The newest entry of each record in `folder` that has one; files that can't be read are named in
  // `*unreadable`.
  static std::vector<HandoverEntry> ReadAll(const std::string& folder,
                                            std::vector<std::string>* unreadable);

  // Where the record of such an entry lies.
  static std::string Path(const std::string& folder, const HandoverEntry& entry);

  // Whether a record at this path may be of the guest: what its name alone tells.
  static bool MayBeOf(const std::string& path, const std::string& guest);

  // Removes the record of such an entry: nothing about it is open any more. Ok if there is none.
  static absl::Status Forget(const std::string& folder, const HandoverEntry& entry);

  // Removes the records in `folder` that were reserved and never used. Not while sessions run.
  static void RemoveUnused(const std::string& folder);

  // The newest whole entry in a record's bytes. NOT_FOUND: it was reserved and never used.
  // INVALID_ARGUMENT: no whole entry.
  static absl::StatusOr<HandoverEntry> Parse(absl::string_view bytes);

  // One block with this entry, as files hold it. INVALID_ARGUMENT: its names are too long.
  static absl::StatusOr<std::string> Encode(const HandoverEntry& entry);

  // Forgets the record: nothing about this session is open any more.
  absl::Status Remove();

 private:
  HandoverRecord() = default;
  absl::Status CheckNext(HandoverPhase phase) const;

  HandoverEntry entry_;
  std::optional<HandoverPhase> newest_;  // as far as this writer knows
  std::string path_;
  UniqueFd fd_;
  uint64_t blocks_ = 0;
  bool unsure_ = false;  // the block that comes next may hold an entry of ours that failed
};

}  // namespace presync
