// What the target's host offers to guests that come: decided by its own configuration, never by a
// peer.
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "absl/time/time.h"
#include "transport/guest.h"
#include "transport/memory.h"
#include "transport/sync/handover_record.h"
#include "transport/sync/session_id.h"

namespace presync {

// Whether a guest or a region may be called so: names go into messages and file names. Letters,
// digits, '-', '_' and '.', which is not the first; at most 128 of them.
bool IsPlainName(absl::string_view name);

// One region as the source describes it. Checked by the session: a plain name, a sane size.
struct RegionRequest {
  std::string name;
  uint64_t size_bytes = 0;
};

// Whose confirmed bytes a place's memory holds.
struct CopyOwner {
  std::string guest;
  SessionId session = {};
  std::string peer;       // the source's address, for people
  std::string peer_name;  // in its certificate; empty: it showed none
};

// How a guest that waits here would differ from the one that comes.
struct ShapeComparison {
  std::vector<std::string> differences;  // a launch would fail of these
  std::vector<std::string> warnings;     // a launch would not notice them, but the guest may
};

// One guest's place on this host: its memory, and the process that waits for its device state.
// Destroying a place ends the process and removes the memory that were made for it, unless Keep was
// called. One thread at a time may use it.
class TargetPlace {
 public:
  virtual ~TargetPlace() = default;

  virtual const GuestMemory& memory() const = 0;

  // Whether the memory was fresh and zero when this place was made.
  virtual bool memory_was_zero() const = 0;

  // The waiting guest, started (or, after a handover that was called off, started again) if need
  // be. The pointer is good until the next call. FAILED_PRECONDITION: it does not fit the memory,
  // with what to change; UNAVAILABLE: it did not start, with its last words.
  virtual absl::StatusOr<TargetGuest*> Waiting(absl::Time deadline) = 0;

  // Ok while the waiting guest's process lives.
  virtual absl::Status Check() = 0;

  // Compares the waiting guest with the one that is to come. Says nothing where that can't be known
  // before a launch. Precondition: Waiting was ok.
  virtual ShapeComparison Compare(const GuestShape& source, absl::Time deadline) {
    (void)source, (void)deadline;
    return {};
  }

  // What the waiting guest's process wrote to its log last, on one line: why it ended. Empty: it is
  // not known, or nothing was written.
  virtual std::string LastWords() { return ""; }

  // Ends the waiting guest's process, which never ran, so that it can't touch the memory any more;
  // the memory stays. Waiting starts a new one. Ok: it is certain that the process is gone.
  virtual absl::Status EndWaiting() = 0;

  // Whether a waiting process has ended by itself since this was last asked: what it did to the
  // memory before is not known.
  virtual bool TakeUnknown() { return false; }

  // The guest runs here now: leave process and memory alone from now on.
  virtual void Keep() = 0;

  // How this host reaches the guest's QEMU, for people and for recovery.
  virtual std::string address() const = 0;

  // Which process waits, for HandoverEntry::process. After Waiting; empty: it can't be told.
  virtual std::string process() const = 0;

  // --- For a copy that outlives presyncd. A place that can't be one need not know of it. ---

  // Notes whose bytes the memory holds, so that the presyncd after this one finds it by
  // TargetHost::TakeKept. Any thread. UNIMPLEMENTED: this memory does not outlive this process;
  // else it could not be noted. After any error no note is there.
  virtual absl::Status NoteCopy(const CopyOwner&) {
    return absl::UnimplementedError("this memory does not outlive presyncd");
  }

  // The memory is no such copy any more: something else than links is about to write it. Once it
  // is ok no later presyncd takes it for one. Any thread.
  virtual absl::Status ForgetCopy() { return absl::OkStatus(); }

  // Ends the waiting guest, and leaves the memory and its note to the presyncd after this one.
  // Nothing but the destructor is called afterwards.
  virtual void Leave() {}
};

// A copy that an earlier presyncd left.
struct KeptPlace {
  CopyOwner owner;
  std::unique_ptr<TargetPlace> place;
};

// Thread-safe.
class TargetHost {
 public:
  virtual ~TargetHost() = default;

  // Makes a place for `guest`. Errors are told to the source's operator: NOT_FOUND: this host's
  // configuration has no such guest; ALREADY_EXISTS: a file or a running guest is in the way;
  // RESOURCE_EXHAUSTED: not enough memory; FAILED_PRECONDITION: regions differ from what is
  // configured.
  virtual absl::StatusOr<std::unique_ptr<TargetPlace>> MakePlace(
      const std::string& guest, const std::vector<RegionRequest>& regions) = 0;

  // The same for a guest that libvirt manages, by its domain's UUID: libvirt starts the process
  // that waits, when it comes to a launch. FAILED_PRECONDITION: this host has nothing to do with
  // libvirt.
  virtual absl::StatusOr<std::unique_ptr<TargetPlace>> MakeDomainPlace(
      const std::string& guest, const std::string& domain,
      const std::vector<RegionRequest>& regions) {
    (void)domain, (void)regions;
    return absl::FailedPreconditionError(
        absl::StrCat("guest ", guest,
                     " is managed by libvirt, and this host's presyncd takes no such guests: add "
                     "[libvirt] to its presyncd.toml and restart it"));
  }

  // Makes sure that the guest of such a record of this host's, which was waiting before presyncd
  // was restarted, never runs. Ok: it is certain. ALREADY_EXISTS: that very guest runs.
  // FAILED_PRECONDITION: what answers there runs, or may be another guest.
  virtual absl::Status EndOrphan(const HandoverEntry& entry) = 0;

  // The copies that an earlier presyncd left and that are whole, each once; `may_be_used` has the
  // last word. The others are given up. Call it once, after recovery has looked at all handovers.
  virtual std::vector<KeptPlace> TakeKept(
      const std::function<bool(const CopyOwner&)>& /*may_be_used*/) {
    return {};
  }
};

}  // namespace presync
