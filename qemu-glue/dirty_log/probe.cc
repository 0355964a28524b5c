#include "qemu-glue/dirty_log/probe.h"

#include <linux/magic.h>
#include <sys/stat.h>
#include <sys/vfs.h>

#include <algorithm>
#include <cerrno>
#include <utility>

#include "absl/strings/str_cat.h"
#include "qemu-glue/dirty_log/glue_client.h"
#include "qemu-glue/dirty_log/guest_process.h"
#include "qemu-glue/dirty_log/tracked_space.h"
#include "qemu-glue/dirty_log/uffd_async_log.h"
#include "qemu-glue/dirty_log/uffd_handler_log.h"
#include "transport/clock.h"

namespace presync {
namespace {

std::string_view NameOf(GlueMode mode) {
  return mode == GlueMode::kAsync ? "uffd-async" : "uffd-handler";
}

absl::StatusOr<std::unique_ptr<DirtyLog>> MakeLog(GlueMode mode, TrackedSpace space) {
  if (mode == GlueMode::kAsync) return UffdAsyncLog::Create(std::move(space));
  return UffdHandlerLog::Create(std::move(space));
}

absl::Status Expect(DirtyLog* log, std::vector<PageRun> expected, std::string_view when) {
  std::vector<PageRun> found;
  const absl::Status peeked = log->Peek(&found);
  if (!peeked.ok()) return peeked;
  if (found == expected) return absl::OkStatus();
  return absl::InternalError(absl::StrCat("trial: ", CountPages(found), " pages instead of ",
                                          CountPages(expected), " were reported as written ",
                                          absl::string_view(when.data(), when.size()),
                                          ": this kernel's tracking does not work as it should"));
}

// Two pages are written, one by a thread of QEMU and one by the kernel for it: exactly those must
// be seen, once.
absl::Status TryOut(DirtyLog* log, GlueClient* client, uint64_t start, absl::Time deadline) {
  constexpr PageRun kAll = {0, PRESYNC_GLUE_SCRATCH_PAGES};
  constexpr PageRun kWritten = {2, 2};
  const uint64_t address = start + PagesToBytes(kWritten.first);
  absl::Status status = log->Arm({kAll});
  if (status.ok()) status = Expect(log, {}, "before anything was");
  if (status.ok()) status = client->WriteScratch(address, deadline);
  if (status.ok()) status = Expect(log, {kWritten}, "after two were");
  if (status.ok()) status = client->WriteScratch(address, deadline);
  if (status.ok()) status = Expect(log, {}, "that were not armed");
  if (status.ok()) status = log->Arm({kWritten});
  if (status.ok()) status = client->WriteScratch(address, deadline);
  if (status.ok()) status = Expect(log, {kWritten}, "after they were armed again");
  return status;
}

absl::Status ProveOnScratch(GlueClient* client, const GuestProcess& process, GlueMode mode,
                            absl::Time deadline) {
  absl::StatusOr<GlueRange> range = client->MakeScratch(mode, deadline);
  if (!range.ok()) return range.status();
  absl::StatusOr<GuestProcess> same = process.Duplicate();
  if (!same.ok()) return same.status();
  const uint64_t start = range->start;
  std::vector<TrackedSegment> segments;
  segments.push_back({{start, {0, PRESYNC_GLUE_SCRATCH_PAGES}, 0}, *std::move(range)});
  auto log = MakeLog(mode, TrackedSpace(*std::move(same), std::move(segments)));
  if (!log.ok()) return log.status();
  const absl::Status worked = TryOut(log->get(), client, start, deadline);
  const absl::Status dropped = client->DropScratch(deadline);
  return worked.ok() ? dropped : worked;
}

// Protects a page of the segment for a moment and looks whether it is. The guest may write to it
// meanwhile, so some others get their chance too.
absl::Status ProveArming(const GuestProcess& process, const TrackedSegment& tracked) {
  constexpr PageCount kCandidates = 64;
  const Segment& segment = tracked.segment;
  const PageCount step = std::max<PageCount>(segment.run.count / kCandidates, 1);
  for (PageCount i = 0; i < segment.run.count; i += step) {
    const uint64_t address = segment.address + PagesToBytes(i);
    absl::Status changed = ProtectMemory(tracked.range.uffd.get(), address, kPageBytes, true);
    if (!changed.ok()) return changed;
    const absl::StatusOr<bool> is_protected = process.IsProtected(address);
    if (!is_protected.ok()) return is_protected.status();
    changed = ProtectMemory(tracked.range.uffd.get(), address, kPageBytes, false);
    if (!changed.ok()) return changed;
    if (*is_protected) return absl::OkStatus();
  }
  return absl::InternalError(
      "guest RAM does not become write-protected although QEMU's kernel says so: pages stay "
      "writable");
}

void UntrackAll(GlueClient* client, const std::vector<TrackedSegment>& tracked,
                absl::Time deadline) {
  for (const TrackedSegment& t : tracked) {
    // Best effort: what stays registered only keeps another mode from being tried.
    client->Untrack(t.range.start, t.range.bytes, deadline).IgnoreError();
  }
}

absl::StatusOr<std::vector<TrackedSegment>> TrackAll(GlueClient* client,
                                                     const GuestProcess& process,
                                                     absl::Span<const Segment> segments,
                                                     GlueMode mode, absl::Time deadline) {
  std::vector<TrackedSegment> tracked;
  absl::Status status;
  for (const Segment& segment : segments) {
    absl::StatusOr<GlueRange> range =
        client->Track(segment.address, segment.bytes(), mode, deadline);
    status = range.status();
    if (!status.ok()) break;
    tracked.push_back({segment, *std::move(range)});
    status = ProveArming(process, tracked.back());
    if (!status.ok()) break;
  }
  if (status.ok()) return tracked;
  UntrackAll(client, tracked, deadline);
  return status;
}

absl::StatusOr<TrackedSpace> TryMode(GlueClient* client, const GuestProcess& process,
                                     absl::Span<const Segment> segments, GlueMode mode,
                                     absl::Time deadline) {
  const absl::Status works = ProveOnScratch(client, process, mode, deadline);
  if (!works.ok()) return works;
  absl::StatusOr<GuestProcess> own = process.Duplicate();
  if (!own.ok()) return own.status();
  absl::StatusOr<std::vector<TrackedSegment>> tracked =
      TrackAll(client, process, segments, mode, deadline);
  if (!tracked.ok()) return tracked.status();
  return TrackedSpace(*std::move(own), *std::move(tracked));
}

std::vector<GlueMode> ModesOf(DirtyLogMode mode) {
  switch (mode) {
    case DirtyLogMode::kUffdAsync:
      return {GlueMode::kAsync};
    case DirtyLogMode::kUffdHandler:
      return {GlueMode::kHandler};
    case DirtyLogMode::kAuto:
      break;
  }
  return {GlueMode::kAsync, GlueMode::kHandler};
}

absl::Status CheckRegions(absl::Span<const RegionFile> regions) {
  PageIndex next = 0;
  for (const RegionFile& region : regions) {
    if (region.run.first != next || region.run.count == 0) {
      return absl::InvalidArgumentError(
          absl::StrCat("guest RAM '", region.name, "' does not follow the region before it"));
    }
    if (region.block_bytes != kPageBytes) {
      return absl::FailedPreconditionError(
          absl::StrCat("guest RAM '", region.name, "' is on pages of ", region.block_bytes,
                       " bytes (hugetlbfs): writes would be seen by whole huge pages only, which "
                       "presync does not "
                       "support: put it on a tmpfs"));
    }
    next = region.run.end();
  }
  return next > 0 ? absl::OkStatus() : absl::InvalidArgumentError("the guest has no RAM to track");
}

absl::Status NoLogWorks(const std::vector<RefusedLog>& refused) {
  std::string text = "no dirty log works for this guest:";
  for (const RefusedLog& log : refused) {
    absl::StrAppend(&text, " [", absl::string_view(log.name.data(), log.name.size()), "] ",
                    log.why.message(), ";");
  }
  text.pop_back();
  return absl::FailedPreconditionError(text);
}

}  // namespace

absl::StatusOr<DirtyLogMode> ParseDirtyLogMode(std::string_view word) {
  if (word == "auto") return DirtyLogMode::kAuto;
  if (word == NameOf(GlueMode::kAsync)) return DirtyLogMode::kUffdAsync;
  if (word == NameOf(GlueMode::kHandler)) return DirtyLogMode::kUffdHandler;
  return absl::InvalidArgumentError(absl::StrCat("dirty log '",
                                                 absl::string_view(word.data(), word.size()),
                                                 "' is none of: auto, uffd-async, uffd-handler"));
}

absl::StatusOr<RegionFile> DescribeRegion(std::string name, int fd, PageRun run) {
  struct stat file = {};
  if (::fstat(fd, &file) != 0) {
    return absl::ErrnoToStatus(errno,
                               absl::StrCat("looking at the file of guest RAM '", name, "'"));
  }
  RegionFile region;
  region.name = std::move(name);
  region.device = file.st_dev;
  region.inode = file.st_ino;
  region.run = run;
  // hugetlbfs says its page size here; a tmpfs with huge=... tracks small pages all the same.
  struct statfs system = {};
  if (::fstatfs(fd, &system) == 0 && system.f_type == HUGETLBFS_MAGIC) {
    region.block_bytes = static_cast<uint64_t>(system.f_bsize);
  }
  return region;
}

absl::StatusOr<std::vector<RegionFile>> DescribeRegions(const GuestMemory& memory) {
  std::vector<RegionFile> files;
  for (size_t i = 0; i < memory.regions().size(); ++i) {
    const Region& region = memory.regions()[i];
    absl::StatusOr<RegionFile> file =
        DescribeRegion(region.name(), region.fd(), {memory.FirstPage(i), region.pages()});
    if (!file.ok()) return file.status();
    files.push_back(*std::move(file));
  }
  return files;
}

absl::StatusOr<ProbedLog> ProbeDirtyLog(const ProbeOptions& options) {
  const absl::Time deadline = MonotonicNow() + options.timeout;
  const absl::Status regions_ok = CheckRegions(options.regions);
  if (!regions_ok.ok()) return regions_ok;
  absl::StatusOr<GlueClient> client =
      GlueClient::Connect(options.glue_socket, options.qemu, deadline);
  if (!client.ok()) return client.status();
  absl::StatusOr<GuestProcess> process = GuestProcess::Open(&*client, deadline);
  if (!process.ok()) return process.status();
  absl::StatusOr<std::vector<Segment>> segments = FindSegments(process->maps(), options.regions);
  if (!segments.ok()) return segments.status();

  ProbedLog probed;
  for (const GlueMode mode : ModesOf(options.mode)) {
    absl::StatusOr<TrackedSpace> space = TryMode(&*client, *process, *segments, mode, deadline);
    absl::Status status = space.status();
    if (status.ok()) {
      space->Hold(*std::move(client));
      absl::StatusOr<std::unique_ptr<DirtyLog>> log = MakeLog(mode, *std::move(space));
      if (!log.ok()) return log.status();
      probed.log = *std::move(log);
      return probed;
    }
    if (absl::IsUnavailable(status) || absl::IsDeadlineExceeded(status)) return status;
    probed.refused.push_back({NameOf(mode), std::move(status)});
  }
  return NoLogWorks(probed.refused);
}

absl::Status StopTracking(const std::string& glue_socket, const ProcessIdentity& qemu,
                          absl::Span<const RegionFile> regions, absl::Time deadline) {
  absl::StatusOr<GlueClient> client = GlueClient::Connect(glue_socket, qemu, deadline);
  if (!client.ok()) return client.status();
  const absl::StatusOr<GuestProcess> process = GuestProcess::Open(&*client, deadline);
  if (!process.ok()) return process.status();
  const absl::StatusOr<std::vector<Segment>> segments = FindSegments(process->maps(), regions);
  if (!segments.ok()) return segments.status();
  for (const Segment& segment : *segments) {
    const absl::Status status = client->Untrack(segment.address, segment.bytes(), deadline);
    if (!status.ok() && !absl::IsFailedPrecondition(status)) return status;
  }
  return absl::OkStatus();
}

}  // namespace presync
