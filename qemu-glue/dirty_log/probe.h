// Chooses the dirty log for a running QEMU, and proves it before it is trusted.
#pragma once

#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "qemu-glue/dirty_log/guest_maps.h"
#include "qemu-glue/process_identity.h"
#include "transport/dirty_log.h"
#include "transport/memory.h"

namespace presync {

enum class DirtyLogMode { kAuto, kUffdAsync, kUffdHandler };

// "auto", "uffd-async" or "uffd-handler". INVALID_ARGUMENT: another word.
absl::StatusOr<DirtyLogMode> ParseDirtyLogMode(std::string_view word);

struct ProbeOptions {
  std::string glue_socket;          // path given to the library in QEMU
  ProcessIdentity qemu;             // the process that must be there
  std::vector<RegionFile> regions;  // ascending, covering the guest's pages without a gap
  DirtyLogMode mode = DirtyLogMode::kAuto;
  absl::Duration timeout = absl::Seconds(10);  // for all of it; it takes a few milliseconds
};

struct RefusedLog {
  std::string_view name;
  absl::Status why;
};

struct ProbedLog {
  std::unique_ptr<DirtyLog> log;    // keeps its own connection to QEMU
  std::vector<RefusedLog> refused;  // better logs that were tried and can't be used here
};

// Who a region of RAM is, for ProbeOptions.
absl::StatusOr<RegionFile> DescribeRegion(std::string name, int fd, PageRun run);
absl::StatusOr<std::vector<RegionFile>> DescribeRegions(const GuestMemory& memory);

// Tries the logs of `mode`, best first. Each has to report exactly the pages that QEMU writes, by a
// thread and through the kernel, in memory made for that purpose; then a page of every piece of
// guest RAM is protected for a moment and must read back as protected. Guest RAM is never written.
// Blocks.
//
// Fails with what GlueClient::Connect, GuestProcess::Open and FindSegments say; with
// FAILED_PRECONDITION if no log of the mode works here: the text lists each with its reason and
// remedy.
absl::StatusOr<ProbedLog> ProbeDirtyLog(const ProbeOptions& options);

// Takes all tracking of `regions` off again, so that QEMU can use userfaultfd itself (background
// snapshots, post-copy). A log that ends leaves it on, for the next presyncd to resume.
// Precondition: no log of this guest is alive here. Fails as GlueClient::Connect,
// GuestProcess::Open and FindSegments do; ok if nothing was tracked.
absl::Status StopTracking(const std::string& glue_socket, const ProcessIdentity& qemu,
                          absl::Span<const RegionFile> regions, absl::Time deadline);

}  // namespace presync
