// Starts the syncs again that an earlier presyncd had when it ended: each in a thread of its own,
// so that a monitor, or a libvirt, that hangs delays nobody else's, again and again until it goes
// on, can't any more, or a person says otherwise.
#pragma once

#include <functional>
#include <map>
#include <string>
#include <thread>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/time/time.h"
#include "tools/presyncd/sync_note.h"
#include "transport/mutex.h"
#include "transport/sync/source_session.h"

namespace presync {

// Thread-safe.
class GoingOn {
 public:
  // What a try to start a sync again came to.
  struct Try {
    absl::Status status;    // ok: it goes on, or nobody wants it any more
    bool for_good = false;  // with an error: it can't go on any more
  };
  struct Options {
    // One try. It may block; its own thread calls it, once Begin() was called.
    std::function<Try(const SyncNote& note)> start;
    std::function<void(bool problem, const std::string& line)> log = [](bool, const std::string&) {
    };
    // Between two tries; twice as long after each, up to the longest: what is looked at is a guest
    // that runs.
    absl::Duration first_wait = absl::Seconds(1);
    absl::Duration longest_wait = absl::Seconds(15);
  };

  explicit GoingOn(Options options) : options_(std::move(options)) {}
  ~GoingOn() { End(); }

  // Once.
  void Begin(std::vector<SyncNote> notes) ABSL_LOCKS_EXCLUDED(mutex_);

  // No try begins after this; waits for those that are under way. status() stays as it was.
  void End() ABSL_LOCKS_EXCLUDED(mutex_);

  // Whether the guest's sync is still to be started by a try.
  bool Wants(const std::string& guest) const ABSL_LOCKS_EXCLUDED(mutex_);

  // A person said otherwise: no try begins after this, and nothing is told of it any more. Does not
  // wait for one that is under way. False: there was nothing to forget.
  bool Forget(const std::string& guest) ABSL_LOCKS_EXCLUDED(mutex_);

  // Of those that do not go on yet ("connecting", with why) and of those that can't any more
  // ("failed").
  std::vector<SessionStatus> status() const ABSL_LOCKS_EXCLUDED(mutex_);

 private:
  struct Waiting {
    SyncNote note;
    std::string problem;
    bool over = false;
  };

  void Run(const SyncNote& note) ABSL_LOCKS_EXCLUDED(mutex_);
  // Whether the thread's work is done.
  bool Take(const std::string& guest, const Try& tried) ABSL_LOCKS_EXCLUDED(mutex_);
  bool WantsLocked(const std::string& guest) const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);

  const Options options_;
  mutable Mutex mutex_;
  bool ending_ ABSL_GUARDED_BY(mutex_) = false;
  std::map<std::string, Waiting> waiting_ ABSL_GUARDED_BY(mutex_);
  std::vector<std::thread> threads_;  // last: they use all of the above
};

}  // namespace presync
