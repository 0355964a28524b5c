// The device state on its way out of a QEMU that libvirt told to save it.
//
// QEMU does not say where its stream ends: with libvirt's capability `return-path` it keeps the
// socket open and waits for the other QEMU's word that all was loaded, which has to travel the
// other way. But the stream describes itself at its end (QEMU_VM_EOF, then QEMU_VM_VMDESCRIPTION
// with a length and that many bytes of JSON: migration/savevm.c), and by that it is known.
#pragma once

#include <cstddef>
#include <string>
#include <string_view>
#include <thread>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/time/time.h"
#include "transport/mutex.h"
#include "transport/unique_fd.h"

namespace presync {

// Finds the end in pieces of a stream.
class StreamEnd {
 public:
  // Whether the stream is whole with this piece.
  bool Take(std::string_view piece);

 private:
  std::string tail_;
};

// Passes the stream on until its end, in a thread of its own. Thread-safe.
class SavedStream {
 public:
  // Reads from QEMU, writes to `out`, which is closed when nothing more comes.
  SavedStream(UniqueFd qemu, UniqueFd out);
  ~SavedStream();

  // Waits until the stream was passed on whole. UNAVAILABLE: it broke before its end.
  // DEADLINE_EXCEEDED: neither yet.
  absl::Status AwaitWhole(absl::Time deadline) const ABSL_LOCKS_EXCLUDED(mutex_);
  // When the last bytes came.
  absl::Time quiet_since() const ABSL_LOCKS_EXCLUDED(mutex_);
  // What has come so far is all, whatever it looks like.
  void TakeAsWhole() ABSL_LOCKS_EXCLUDED(mutex_);

 private:
  void Pass();
  bool PassSome(StreamEnd* end, std::string* buffer);
  void End(absl::Status status) ABSL_LOCKS_EXCLUDED(mutex_);

  const UniqueFd qemu_;
  UniqueFd out_;  // the thread's
  const UniqueFd wake_;
  mutable Mutex mutex_;
  bool over_ ABSL_GUARDED_BY(mutex_) = false;
  absl::Status status_ ABSL_GUARDED_BY(mutex_);
  absl::Time quiet_since_ ABSL_GUARDED_BY(mutex_);
  std::thread thread_;  // last: it uses all of the above
};

}  // namespace presync
