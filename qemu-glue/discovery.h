// What a QEMU is, asked through its monitor: its RAM and where that lives, and whatever stands in
// the way of mirroring it.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "absl/types/span.h"
#include "qemu-glue/qmp/qmp_client.h"

namespace presync {

// One memory backend: a piece of guest RAM.
struct RamBackend {
  std::string id;    // the object's id; the same on both hosts
  std::string type;  // "memory-backend-file", ...
  std::string path;  // its file (`mem-path`); empty for types that have none
  uint64_t size_bytes = 0;
  bool shared = false;
};

struct GuestInfo {
  QmpVersion version;
  std::string name;                  // empty if it has none
  std::string uuid;                  // all zeros if it has none
  bool kvm = false;                  // hardware virtualization; otherwise TCG
  std::string run_state;             // QEMU's own word: "running", "inmigrate", ...
  uint64_t ram_bytes = 0;            // what the machine has, plugged DIMMs included
  std::vector<RamBackend> backends;  // ascending by id
};

// Something that keeps presync from mirroring this guest, and what a person can do about it.
struct Problem {
  std::string what;
  std::string remedy;
  // It writes guest memory, or may, past every dirty log: once it is gone nothing is known to be
  // synced.
  bool writes_unseen = false;
};

struct Findings {
  std::vector<Problem> problems;   // every one that was found; none: the guest can be mirrored
  std::vector<std::string> notes;  // worth knowing, no obstacle
  // What presync can't rule out and an operator has to know of: whole sentences.
  std::vector<std::string> warnings;
  // Pages may leave the guest's memory and come back while it runs (balloon, free-page reporting).
  bool memory_may_be_discarded = false;
  // The guest may run guests of its own under KVM, which writes some of its pages unseen meanwhile.
  bool may_nest = false;
};

// Blocks until answered. Errors as QmpClient::Execute; INVALID_ARGUMENT also for an answer that
// makes no sense.
absl::StatusOr<GuestInfo> DescribeGuest(QmpClient& qmp, absl::Time deadline);

// Whether a running guest can be mirrored and handed over. The files are looked at by their paths,
// so presync must see the same file systems as QEMU.
absl::StatusOr<Findings> CheckTrackable(QmpClient& qmp, const GuestInfo& guest,
                                        absl::Time deadline);

// Whether a QEMU that somebody else started (attach mode) can receive the guest whose backends are
// `source` (ids and sizes count; paths are each host's own).
absl::StatusOr<Findings> CheckTarget(QmpClient& qmp, const GuestInfo& target,
                                     absl::Span<const RamBackend> source, absl::Time deadline);

}  // namespace presync
