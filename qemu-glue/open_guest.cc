#include "qemu-glue/open_guest.h"

#include <fstream>
#include <iterator>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "absl/strings/strip.h"
#include "qemu-glue/dirty_log/probe.h"
#include "qemu-glue/mapped_file.h"
#include "qemu-glue/qemu_guest.h"
#include "qemu-glue/qemu_guest_calls.h"
#include "qemu-glue/qmp/peer_process.h"
#include "qemu-glue/qmp/qmp_client.h"
#include "transport/clock.h"

namespace presync {
namespace {

constexpr absl::string_view kSocketVariable = "PRESYNC_GLUE_SOCKET=";

absl::Status ToStatus(const std::vector<Problem>& problems) {
  if (problems.empty()) return absl::OkStatus();
  std::vector<std::string> texts;
  for (const Problem& problem : problems) {
    texts.push_back(absl::StrCat(problem.what, " -> ", problem.remedy));
  }
  return absl::FailedPreconditionError(
      absl::StrCat("the guest can't be kept in sync: ", absl::StrJoin(texts, "; ")));
}

std::string ReadEnvironment(pid_t pid) {
  std::ifstream in(absl::StrCat("/proc/", pid, "/environ"), std::ios::binary);
  return std::string((std::istreambuf_iterator<char>(in)), std::istreambuf_iterator<char>());
}

absl::StatusOr<std::string> GlueSocketOf(const PeerProcess& process) {
  absl::StatusOr<std::vector<std::string>> arguments = process.CommandLine();
  if (!arguments.ok()) return arguments.status();
  std::string path = FindGlueSocket(*arguments, ReadEnvironment(process.pid()));
  if (path.empty()) {
    return absl::FailedPreconditionError(
        "this QEMU was started without presync's plug-in; start it with -plugin "
        "presync_glue.so,socket=PATH, or where QEMU was built without plug-ins with "
        "LD_PRELOAD=presync_glue.so PRESYNC_GLUE_SOCKET=PATH");
  }
  return path;
}

absl::StatusOr<GuestMemory> OpenMemory(const GuestInfo& info, const PeerProcess& process) {
  std::vector<Region> regions;
  for (const RamBackend& backend : info.backends) {
    absl::StatusOr<Region> region =
        OpenMappedRegion(process, backend.id, backend.path, backend.size_bytes);
    if (!region.ok()) return region.status();
    regions.push_back(*std::move(region));
  }
  return GuestMemory::Create(std::move(regions));
}

absl::StatusOr<std::unique_ptr<SourceGuest>> MakeGuest(const OpenGuestOptions& options,
                                                       std::unique_ptr<QmpClient> qmp,
                                                       absl::Time deadline) {
  if (options.make_guest != nullptr) return options.make_guest(std::move(qmp), deadline);
  return QemuSourceGuest::Create(std::move(qmp), deadline);
}

}  // namespace

std::string FindGlueSocket(const std::vector<std::string>& arguments,
                           const std::string& environment) {
  for (size_t i = 0; i + 1 < arguments.size(); ++i) {
    if (arguments[i] != "-plugin" || !absl::StrContains(arguments[i + 1], "presync_glue")) continue;
    for (absl::string_view part : absl::StrSplit(arguments[i + 1], ',')) {
      if (absl::ConsumePrefix(&part, "socket=")) return std::string(part);
    }
  }
  for (absl::string_view variable : absl::StrSplit(environment, '\0')) {
    if (absl::ConsumePrefix(&variable, kSocketVariable)) return std::string(variable);
  }
  return "";
}

absl::StatusOr<OpenedGuest> OpenGuest(const OpenGuestOptions& options, absl::Time deadline) {
  absl::StatusOr<DirtyLogMode> mode = ParseDirtyLogMode(options.dirty_log);
  if (!mode.ok()) return mode.status();
  absl::StatusOr<std::unique_ptr<QmpClient>> qmp = QmpClient::Connect(options.qmp_path, deadline);
  if (!qmp.ok()) return qmp.status();
  absl::StatusOr<GuestInfo> info = DescribeGuest(**qmp, deadline);
  if (!info.ok()) return info.status();
  // From here on all is asked of this one process; what its monitor says of files and sockets only
  // tells which of its own are meant.
  const absl::StatusOr<PeerProcess> process = PeerProcess::Identify(**qmp, deadline);
  if (!process.ok()) return process.status();
  const ProcessIdentity identity = IdentityOf(*process);
  if (!identity.known()) {
    return absl::UnavailableError(absl::StrCat("QEMU (process ", process->pid(), ") has ended"));
  }
  if (absl::Status s = options.check(*info, identity); !s.ok()) return s;
  absl::StatusOr<Findings> findings = CheckTrackable(**qmp, *info, deadline);
  if (!findings.ok()) return findings.status();
  if (absl::Status s = ToStatus(findings->problems); !s.ok()) return s;

  std::string glue_path = options.glue_path;
  if (glue_path.empty()) {
    absl::StatusOr<std::string> found = GlueSocketOf(*process);
    if (!found.ok()) return found.status();
    glue_path = *std::move(found);
  }
  absl::StatusOr<GuestMemory> memory = OpenMemory(*info, *process);
  if (!memory.ok()) return memory.status();
  absl::StatusOr<std::vector<RegionFile>> files = DescribeRegions(*memory);
  if (!files.ok()) return files.status();
  absl::StatusOr<ProbedLog> probed =
      ProbeDirtyLog({.glue_socket = glue_path, .qemu = identity, .regions = *files, .mode = *mode});
  if (!probed.ok()) return probed.status();
  for (const RefusedLog& refused : probed->refused) {
    findings->notes.push_back(absl::StrCat("dirty log ", std::string(refused.name),
                                           " not used: ", refused.why.message()));
  }
  absl::StatusOr<std::unique_ptr<SourceGuest>> guest =
      MakeGuest(options, *std::move(qmp), deadline);
  if (!guest.ok()) return guest.status();
  return OpenedGuest{.info = *std::move(info),
                     .process = identity,
                     .memory = *std::move(memory),
                     .log = std::move(probed->log),
                     .guest = *std::move(guest),
                     .notes = std::move(findings->notes),
                     .memory_may_be_discarded = findings->memory_may_be_discarded,
                     .stop_tracking = [glue_path, identity, files = *std::move(files)] {
                       return StopTracking(glue_path, identity, files,
                                           MonotonicNow() + absl::Seconds(5));
                     }};
}

}  // namespace presync
