// The guest, as the transport sees it: something that can be stopped, whose device state can be
// streamed out on one host and in on the other, and that must never run on both.
#pragma once

#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/time/time.h"
#include "transport/unique_fd.h"

namespace presync {

enum class RunState {
  kRunning,
  kPaused,    // stopped, could run
  kIncoming,  // a target that still waits for, or loads, its device state
  kGone,      // its process has ended
};

// What one look at a guest's devices tells of their requests that write guest memory: reads of
// disks, above all, which may write it without any fault (docs/design.md, "Reads under way").
struct RequestLook {
  absl::Time at = absl::InfinitePast();  // when the look began
  // Of the requests that ended since the look before, none had been in flight for longer than this.
  // Infinite: not known. What was not looked at is covered by the next look.
  absl::Duration longest = absl::InfiniteDuration();
};

// One thing that a guest is made of, and that the host where it will run has to have alike:
// {"machine", "pc-q35-7.2-machine"}. What there is to compare is up to whoever knows such guests.
struct GuestTrait {
  std::string key;
  std::string value;
  bool operator==(const GuestTrait&) const = default;
};
using GuestShape = std::vector<GuestTrait>;

// What a look at a guest found that matters to its sync, apart from its memory's bytes.
struct GuestOutlook {
  // Ok: nothing that is known stands in a launch's way. UNAVAILABLE: the guest's process has ended.
  // Else why it can't be launched as it is now, with what to do.
  absl::Status launchable;
  // Ok: all of the guest's memory is mirrored, and no device writes it unseen. Else a part of
  // `launchable` that counts for whoever would move the guest, in whatever state it is.
  absl::Status mirrorable;
  // Something wrote guest memory past every dirty log, or may have, since the last look, and is
  // there no more: nothing is synced that was not compared since.
  bool was_written_unseen = false;
  // A launch has to compare all memory before the guest may run on the target.
  bool compare_all = false;
  std::vector<std::string> warnings;  // whole sentences, for the guest's operator
  GuestShape shape;                   // empty: nothing is known that could be compared
};

// A guest whose moves are not presync's to make but its manager's (libvirt): the manager starts the
// process on the target, tells the guest to save its state and to run there, and undoes all of it
// when something fails. presync keeps the memory in sync and stands between the two processes: the
// device state passes through it, and its last byte only when everything else is there. One thread
// at a time, the one that uses the guest. Nothing blocks for long but Expect.
class ManagedLaunch {
 public:
  virtual ~ManagedLaunch() = default;

  // The manager is about to save the guest: from now on its memory stays out of what is saved. Ends
  // with the launch, with Forget, or by itself after some minutes without a launch.
  // FAILED_PRECONDITION: something else is under way with this guest; else as SourceGuest.
  virtual absl::Status Expect(absl::Time deadline) = 0;
  // No launch will come of it. Ok to call at any time.
  virtual void Forget() = 0;
  virtual bool expected() const = 0;

  // Tells the manager to move the guest, and returns at once. ALREADY_EXISTS: it was told before,
  // and is not done.
  virtual absl::Status Order() = 0;
  // What came of it, once, when the manager is done with the order.
  virtual std::optional<absl::Status> TakeOrderEnd() = 0;

  // Whether the manager has begun to save the guest, ordered or by itself: hand it over at once, or
  // Resume it. It stands still now, or will in some milliseconds.
  virtual bool Begun() = 0;

  // What the target's process answers on the guest's stream (StateReturn): for the process here.
  // UNAVAILABLE: it does not listen any more.
  virtual absl::Status TakeReturn(absl::string_view bytes) = 0;
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

  // The guest is stopped when it returns: none of its vCPUs writes memory, and every request of its
  // devices has ended. Device code may still write, until FinishSave returns, and is seen by the
  // dirty log. Since when it stands still, by this host's clock.
  virtual absl::StatusOr<absl::Time> Stop(absl::Time deadline) = 0;

  // Lets the rest of the device state through, and returns when all of it was written to the
  // stream. Someone must be reading the stream meanwhile.
  virtual absl::Status FinishSave(absl::Time deadline) = 0;

  // Every piece of the stream, in order, is shown to it as it passes. From one thread, which may be
  // another than the one that calls the rest.
  virtual void OnSaved(absl::string_view bytes) { (void)bytes; }
  // After all of the stream was shown: FAILED_PRECONDITION if somebody paused the guest since the
  // launch began. Then it must not run on the target, and Resume leaves it paused here.
  virtual absl::Status CheckRan() { return absl::OkStatus(); }

  // The guest runs again on this host as if nothing had happened. Ok if it already runs, and if
  // somebody else paused it.
  virtual absl::Status Resume(absl::Time deadline) = 0;

  // Ends the guest's process on this host for good: it has moved away.
  virtual absl::Status Quit(absl::Time deadline) = 0;

  virtual absl::StatusOr<RunState> State(absl::Time deadline) = 0;

  // Looks at the requests of the guest's devices: now and then while it is kept in sync, and once
  // more after Stop. A guest of which nothing can be known answers so.
  virtual absl::StatusOr<RequestLook> LookAtRequests(absl::Time deadline) {
    (void)deadline;
    return RequestLook{};
  }

  // Looks at what a launch depends on apart from memory. Some milliseconds, unless something
  // changed since the last look or it is the first: then up to a few tenths of a second. What can't
  // be looked at before `deadline` is said in `launchable`.
  virtual GuestOutlook Look(absl::Time deadline);

  // Directly before it is given up: Ok while the guest stands still since Stop.
  // FAILED_PRECONDITION: its manager, or a person, has let it go on here.
  virtual absl::Status StandsStill(absl::Time deadline) = 0;

  // The guest was given up, and whether it runs on the target is not known: it must stand still
  // here, whatever its manager, or a person, thinks. Ok: it does, or its process is gone. ABORTED:
  // it ran; it was stopped again.
  virtual absl::Status HoldStill(absl::Time deadline) = 0;

  // Null for a guest that presync itself moves. For one that has a manager the calls above do the
  // manager's part by waiting for it: BeginSave needs Begun, Resume waits until the manager has
  // taken its migration back, Quit until it has ended the guest here.
  virtual ManagedLaunch* managed() { return nullptr; }
};

// What a guest's process writes against the stream that it loads from. Any thread.
using ReturnBytes = std::function<void(absl::string_view bytes)>;

// A guest on the host it will run on: a process that waits for device state, its RAM being the
// memory that is mirrored. Thread and error rules as above.
class TargetGuest {
 public:
  virtual ~TargetGuest() = default;

  // From BeginLoad on, until the process is discarded or this object destroyed, `on_return` is
  // given what the process answers. For guests with a manager only: others answer nothing.
  virtual void OnReturn(ReturnBytes on_return) { (void)on_return; }

  // Returns the end to write the device state to; close it after the last byte. Bytes written to it
  // may be loaded at once, and loading reads guest RAM: nothing that the source saved after its
  // guest stopped may be written before the residual is in place.
  virtual absl::StatusOr<UniqueFd> BeginLoad(absl::Time deadline) = 0;

  // Directly before what was saved last is written to the stream: an order to run that somebody
  // else gave meanwhile is taken back.
  virtual absl::Status StayPaused(absl::Time) { return absl::OkStatus(); }

  // Whether the guest was seen to run here, if only for a moment, whoever told it to. After it was
  // discarded it says what was known until then.
  virtual bool HasRun() { return false; }

  // Returns when the whole state is loaded and the guest is paused, ready to run. INTERNAL: it ran
  // although nobody of presync's told it to.
  virtual absl::Status AwaitLoaded(absl::Time deadline) = 0;

  // Runs the guest. Ok means it runs. FAILED_PRECONDITION: it refused, or its process had ended
  // before it was told, and not one instruction was run; after any other error it may have run.
  virtual absl::Status Run(absl::Time deadline) = 0;

  // Ends the waiting process; it never ran.
  virtual absl::Status Discard(absl::Time deadline) = 0;

  virtual absl::StatusOr<RunState> State(absl::Time deadline) = 0;
};

}  // namespace presync
