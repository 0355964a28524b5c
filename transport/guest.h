// The guest, as the transport sees it: something that can be stopped, whose device state can be
// streamed out on one host and in on the other, and that must never run on both.
#pragma once

#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "transport/unique_fd.h"

namespace presync {

enum class RunState {
  kRunning,
  kPaused,    // stopped, could run
  kIncoming,  // a target that still waits for, or loads, its device state
  kGone,      // its process has ended
};

// A guest on the host it runs on. One thread at a time may use it. Every call that blocks takes a
// deadline and fails with DEADLINE_EXCEEDED; UNAVAILABLE means that the guest's process is gone;
// FAILED_PRECONDITION that the guest refused, with its own words.
//
// Order of a handover: PrepareSave, BeginSave, Stop, FinishSave, then Quit on success; Resume
// undoes whatever was done so far, at any point.
class SourceGuest {
 public:
  virtual ~SourceGuest() = default;

  // Does whatever can be done ahead of BeginSave, so that it takes less time then. The guest runs
  // on.
  virtual absl::Status PrepareSave(absl::Time deadline) = 0;

  // Starts streaming the device state and returns the end to read it from. Only what can be saved
  // live comes through before Stop; when that is through the guest may stop by itself, so Stop
  // should follow closely. The stream ends (EOF) after FinishSave has succeeded.
  virtual absl::StatusOr<UniqueFd> BeginSave(absl::Time deadline) = 0;

  // The guest is stopped when it returns: none of its vCPUs writes memory. Device code may still,
  // until FinishSave returns. Since when it stands still, by this host's clock.
  virtual absl::StatusOr<absl::Time> Stop(absl::Time deadline) = 0;

  // Lets the rest of the device state through, and returns when all of it was written to the
  // stream. Someone must be reading the stream meanwhile.
  virtual absl::Status FinishSave(absl::Time deadline) = 0;

  // The guest runs again on this host as if nothing had happened. Ok if it already runs.
  virtual absl::Status Resume(absl::Time deadline) = 0;

  // Ends the guest's process on this host for good: it has moved away.
  virtual absl::Status Quit(absl::Time deadline) = 0;

  virtual absl::StatusOr<RunState> State(absl::Time deadline) = 0;
};

// A guest on the host it will run on: a process that waits for device state, its RAM being the
// memory that is mirrored. Thread and error rules as above.
class TargetGuest {
 public:
  virtual ~TargetGuest() = default;

  // Returns the end to write the device state to; close it after the last byte. Bytes written to it
  // may be loaded at once, and loading reads guest RAM: nothing that the source saved after its
  // guest stopped may be written before the residual is in place.
  virtual absl::StatusOr<UniqueFd> BeginLoad(absl::Time deadline) = 0;

  // Returns when the whole state is loaded and the guest is paused, ready to run.
  virtual absl::Status AwaitLoaded(absl::Time deadline) = 0;

  // Runs the guest. Ok means it runs. FAILED_PRECONDITION: it refused, or its process had ended
  // before it was told, and not one instruction was run; after any other error it may have run.
  virtual absl::Status Run(absl::Time deadline) = 0;

  // Ends the waiting process; it never ran.
  virtual absl::Status Discard(absl::Time deadline) = 0;

  virtual absl::StatusOr<RunState> State(absl::Time deadline) = 0;
};

}  // namespace presync
