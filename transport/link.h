// The link: what carries page contents from the source's guest RAM into the target's.
//
// RDMA, TCP and the fake with scripted faults all stand behind these two interfaces and are
// indistinguishable through them; tests/transport/link_contract.h is one suite that proves it.
//
// Life of a write: the caller posts it; later the link reports it *completed* (the source bytes may
// change again, the page may be posted again), which says nothing about the target; after a commit
// that was posted later is *confirmed*, the target's memory holds it. No Poll shows a commit before
// the completions of the writes it covers.
//
// Memory is handed to a link when it is made: that is where registration happens, which may be
// slow, may give memory to holes of the files, and must precede the sync.
#pragma once

#include <cstdint>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "absl/types/span.h"
#include "predictor/page.h"

namespace presync {

// One write: a run of pages within one region. A zero write carries no payload: the target's pages
// become zero.
struct PageWrite {
  PageRun run;
  bool zero = false;

  friend bool operator==(const PageWrite&, const PageWrite&) = default;
};

// Commits of one link are numbered 1, 2, 3, ...; 0 is "none yet".
using CommitId = uint64_t;

// What Poll found since the last Poll.
struct LinkEvents {
  std::vector<PageWrite> completed;  // each posted write exactly once, in any order
  CommitId committed = 0;            // newest commit confirmed by the target so far

  void Clear() { completed.clear(); }
};

// Counters since the link was made, and its latest signals.
struct LinkStats {
  uint64_t wire_bytes = 0;     // given to the network: payload and framing, after compression
  uint64_t payload_bytes = 0;  // guest bytes carried with payload (zero runs not counted)
  uint64_t zero_bytes = 0;     // guest bytes carried as zero runs
  uint64_t queued_bytes = 0;   // of writes that were accepted and have not completed, now
  // Time from post to completion, median of recent writes; zero where nothing was measured.
  absl::Duration completion_latency = absl::ZeroDuration();
  // The same over writes that hardly waited behind others of this link, so that it tells of the
  // network alone; zero where a link can't tell (TCP: the kernel takes the bytes long before).
  absl::Duration network_latency = absl::ZeroDuration();
  // How long bytes wait in queues of the network now, this link's own among them; zero where it is
  // not known (RDMA has marks and latency instead).
  absl::Duration queueing_delay = absl::ZeroDuration();
  absl::Duration round_trip = absl::ZeroDuration();  // without any queue; zero: not known
  // Signs that this host's sending met congestion: notifications that its device counts, over TCP
  // segments that were sent again.
  uint64_t congestion_marks = 0;
};

// The source's end. One thread at a time may use it. Destroying it ends the connection at once.
class SourceLink {
 public:
  virtual ~SourceLink() = default;

  // "tcp", "rdma", "fake": for logs and status.
  virtual std::string_view name() const = 0;

  // Starts a prefix of `writes` and returns its length; 0 is back-pressure, not failure: Wait,
  // Poll, try again. Does not block. The caller keeps the bytes of a posted page in place until it
  // completes, and never posts a page that has not completed (invariant: one write in flight a
  // page). The bytes may change meanwhile: then the target holds a mixture, and the caller must
  // know that the page is stale. INVALID_ARGUMENT: the first run is empty, outside the memory or
  // crosses a region (such a run further on ends the prefix before it). UNAVAILABLE: the link is
  // gone; nothing that was not confirmed may be trusted.
  virtual absl::StatusOr<size_t> Post(absl::Span<const PageWrite> writes) = 0;

  // Asks the target to confirm every write posted so far. Does not block; the answer comes by Poll.
  // UNAVAILABLE as above; RESOURCE_EXHAUSTED: too many commits under way (at least 16 fit).
  virtual absl::StatusOr<CommitId> PostCommit() = 0;

  // Appends what completed to `events->completed` and sets `events->committed`. Does not block.
  // UNAVAILABLE as above; `events` is then unchanged.
  virtual absl::Status Poll(LinkEvents* events) = 0;

  // Returns when Poll may have news, the link failed, or at `deadline`. OK in each of these cases.
  virtual absl::Status Wait(absl::Time deadline) = 0;

  virtual LinkStats stats() const = 0;

  // Caps what the link itself puts on the wire, bytes per second over all its streams, so that its
  // own queues (and a switch's) stay short; 0 = no cap. Advisory: a link that can't, ignores it.
  virtual void SetPacing(uint64_t bytes_per_s) = 0;
};

// The target's end: receives into guest RAM by itself until it is closed. Thread-safe.
class TargetLink {
 public:
  virtual ~TargetLink() = default;

  virtual std::string_view name() const = 0;

  // Ok while the link works; else why it ended (UNAVAILABLE: the peer is gone; INVALID_ARGUMENT:
  // the peer broke the protocol; CANCELLED: Close was called).
  virtual absl::Status health() const = 0;

  // Ends the link. After it returns nothing writes to the guest's RAM through this link any more;
  // called before the target guest runs. Idempotent.
  virtual void Close() = 0;
};

}  // namespace presync
