// Where `presync record` has its scans from: a guest that it opens itself, or one that presyncd
// keeps in sync.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "predictor/page.h"
#include "transport/dirty_log.h"
#include "transport/memory.h"

namespace presync {

// Scans of one recording, in order. Not thread-safe.
class ScanSource {
 public:
  virtual ~ScanSource() = default;

  virtual PageCount pages() const = 0;
  // Appends the scans that have come, waiting for at most `longest` until there is one. Runs are
  // ascending, within a scan. UNAVAILABLE: nothing follows; the text says why. Then, too, what was
  // appended counts.
  virtual absl::Status Next(absl::Duration longest, std::vector<std::vector<PageRun>>* scans) = 0;
  // So far: scans that came late by whole intervals, in place of which there are empty ones.
  virtual uint64_t missed() const = 0;
  // Ends the recording. The guest goes on.
  virtual absl::Status Stop() = 0;
};

// Arms all memory and looks at it each `interval`. `memory` must outlive it. Errors as DirtyLog.
absl::StatusOr<std::unique_ptr<ScanSource>> RecordLog(std::unique_ptr<DirtyLog> log,
                                                      const GuestMemory* memory,
                                                      absl::Duration interval);

// Opens the guest behind a monitor as presyncd would, which must not have it open. Errors as
// OpenGuest.
absl::StatusOr<std::unique_ptr<ScanSource>> RecordQemu(const std::string& qmp_path,
                                                       const std::string& glue_path,
                                                       absl::Duration interval);

// Lets presyncd record the guest `name`. UNAVAILABLE: presyncd can't be reached; else what it
// answers.
absl::StatusOr<std::unique_ptr<ScanSource>> RecordBesideSync(const std::string& socket,
                                                             const std::string& name,
                                                             absl::Duration interval);

}  // namespace presync
