#include "qemu-glue/discovery.h"

#include <linux/magic.h>
#include <sys/stat.h>
#include <sys/vfs.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "qemu-glue/discovery_devices.h"
#include "qemu-glue/nested_virtualization.h"
#include "qemu-glue/qmp/peer_process.h"

namespace presync {
namespace {

constexpr char kUseFile[] =
    "start QEMU with -object memory-backend-file,id=ram0,size=...,share=on,mem-path=/dev/shm/NAME "
    "(a "
    "file, not a directory) and -machine ...,memory-backend=ram0; with libvirt: "
    "<memoryBacking><source "
    "type='file'/><access mode='shared'/></memoryBacking> and memory_backing_dir on a tmpfs";

absl::StatusOr<RamBackend> ReadBackend(QmpClient& qmp, const Json& memdev, absl::Time deadline) {
  RamBackend backend;
  backend.id = StringAt(memdev, "id");
  std::optional<uint64_t> size = UintAt(memdev, "size");
  if (backend.id.empty() || !size.has_value()) {
    return absl::InvalidArgumentError(
        absl::StrCat("query-memdev: a backend without id or size: ", ToText(memdev)));
  }
  backend.size_bytes = *size;
  const std::string object = absl::StrCat("/objects/", backend.id);
  absl::StatusOr<Json> share =
      qmp.Execute("qom-get", {{"path", object}, {"property", "share"}}, deadline);
  if (!share.ok()) return share.status();
  backend.shared = share->is_boolean() && *share->get_ptr<const bool*>();
  // Only file backends have this property; the type tells the rest.
  absl::StatusOr<Json> path =
      qmp.Execute("qom-get", {{"path", object}, {"property", "mem-path"}}, deadline);
  if (!path.ok() && !absl::IsFailedPrecondition(path.status())) return path.status();
  if (path.ok() && path->is_string()) backend.path = *path->get_ptr<const std::string*>();
  return backend;
}

absl::Status ReadBackends(QmpClient& qmp, GuestInfo& guest, absl::Time deadline) {
  absl::StatusOr<Json> memdevs = qmp.Execute("query-memdev", nullptr, deadline);
  if (!memdevs.ok()) return memdevs.status();
  absl::StatusOr<Json> objects = qmp.Execute("qom-list", {{"path", "/objects"}}, deadline);
  if (!objects.ok()) return objects.status();
  for (const Json& memdev : *memdevs) {
    absl::StatusOr<RamBackend> backend = ReadBackend(qmp, memdev, deadline);
    if (!backend.ok()) return backend.status();
    for (const Json& object : *objects) {
      if (StringAt(object, "name") == backend->id) backend->type = ChildType(object);
    }
    guest.backends.push_back(*std::move(backend));
  }
  std::sort(guest.backends.begin(), guest.backends.end(),
            [](const RamBackend& a, const RamBackend& b) { return a.id < b.id; });
  return absl::OkStatus();
}

void CheckFile(const RamBackend& backend, std::vector<Problem>& problems) {
  struct stat file = {};
  struct statfs system = {};
  const std::string who = absl::StrCat("RAM backend '", backend.id, "': ", backend.path);
  if (::stat(backend.path.c_str(), &file) != 0 || ::statfs(backend.path.c_str(), &system) != 0) {
    problems.push_back({absl::StrCat(who, ": ", std::strerror(errno)),  // NOLINT
                        "let presync see the file under the path that QEMU uses (same mount "
                        "namespace), and don't remove it while the guest runs"});
  } else if (!S_ISREG(file.st_mode)) {
    problems.push_back(
        {absl::StrCat(who, " is not a file; QEMU made a nameless one in it"), kUseFile});
  } else if (system.f_type != TMPFS_MAGIC && system.f_type != HUGETLBFS_MAGIC) {
    problems.push_back({absl::StrCat(who, " is on neither tmpfs nor hugetlbfs"), kUseFile});
  } else if (static_cast<uint64_t>(file.st_size) != backend.size_bytes) {
    problems.push_back(
        {absl::StrCat(who, " has ", file.st_size, " bytes, the backend ", backend.size_bytes),
         "give each guest a file of its own, as long as its RAM"});
  }
}

void CheckBackends(const GuestInfo& guest, std::vector<Problem>& problems) {
  uint64_t backed_bytes = 0;
  for (const RamBackend& backend : guest.backends) {
    backed_bytes += backend.size_bytes;
    if (backend.type != "memory-backend-file") {
      problems.push_back({absl::StrCat("RAM backend '", backend.id, "' (", backend.size_bytes >> 20,
                                       " MiB) is a ", backend.type, ", not a named file"),
                          kUseFile});
    } else if (!backend.shared) {
      problems.push_back(
          {absl::StrCat("RAM backend '", backend.id, "': ", backend.path,
                        " is mapped privately: presync can't see what the guest writes"),
           "add share=on to this memory-backend-file"});
    } else {
      CheckFile(backend, problems);
    }
  }
  if (backed_bytes < guest.ram_bytes) {
    problems.push_back({absl::StrCat("the guest has ", guest.ram_bytes,
                                     " bytes of RAM, its memory backends ", backed_bytes),
                        kUseFile});
  } else if (backed_bytes > guest.ram_bytes) {
    problems.push_back(
        {absl::StrCat("the memory backends hold ", backed_bytes, " bytes, the guest has ",
                      guest.ram_bytes, " of RAM: some backend is not guest RAM"),
         "remove memory-backend objects that the machine does not use as RAM"});
  }
}

absl::Status CheckCapability(QmpClient& qmp, absl::Time deadline, std::vector<Problem>& problems) {
  absl::StatusOr<Json> capabilities = qmp.Execute("query-migrate-capabilities", nullptr, deadline);
  if (!capabilities.ok()) return capabilities.status();
  for (const Json& capability : *capabilities) {
    if (StringAt(capability, "capability") == "x-ignore-shared") return absl::OkStatus();
  }
  problems.push_back(
      {"this QEMU can't leave shared RAM out of its migration stream (no migration "
       "capability x-ignore-shared)",
       "use QEMU 4.0 or later"});
  return absl::OkStatus();
}

// Migration under way, and what QEMU itself says forbids one.
absl::Status CheckMigration(QmpClient& qmp, absl::Time deadline, std::vector<Problem>& problems) {
  absl::StatusOr<Json> migration = qmp.Execute("query-migrate", nullptr, deadline);
  if (!migration.ok()) return migration.status();
  const std::string status = StringAt(*migration, "status");
  constexpr const char* kIdle[] = {"", "none", "completed", "failed", "cancelled"};
  if (std::none_of(std::begin(kIdle), std::end(kIdle),
                   [&](const char* s) { return status == s; })) {
    problems.push_back({absl::StrCat("a migration of this guest is under way (", status, ")"),
                        "wait for its end, or end it with migrate_cancel"});
  }
  const Json* reasons = FindMember(*migration, "blocked-reasons");
  if (reasons == nullptr || !reasons->is_array()) return absl::OkStatus();
  for (const Json& reason : *reasons) {
    problems.push_back(
        {absl::StrCat("QEMU forbids migration: ",
                      reason.is_string() ? *reason.get_ptr<const std::string*>() : ToText(reason)),
         "remove the device or option that QEMU names"});
  }
  return absl::OkStatus();
}

std::string ListBackends(absl::Span<const RamBackend> backends) {
  std::string text;
  for (const RamBackend& backend : backends) {
    absl::StrAppend(&text, text.empty() ? "" : ", ", "'", backend.id, "' of ", backend.size_bytes);
  }
  return text;
}

bool SameLayout(absl::Span<const RamBackend> a, absl::Span<const RamBackend> b) {
  return a.size() == b.size() &&
         std::is_permutation(a.begin(), a.end(), b.begin(), [](const auto& x, const auto& y) {
           return x.id == y.id && x.size_bytes == y.size_bytes;
         });
}

}  // namespace

absl::StatusOr<GuestInfo> DescribeGuest(QmpClient& qmp, absl::Time deadline) {
  GuestInfo guest;
  guest.version = qmp.version();
  absl::StatusOr<Json> name = qmp.Execute("query-name", nullptr, deadline);
  if (!name.ok()) return name.status();
  guest.name = StringAt(*name, "name");
  absl::StatusOr<Json> uuid = qmp.Execute("query-uuid", nullptr, deadline);
  if (!uuid.ok()) return uuid.status();
  guest.uuid = StringAt(*uuid, "UUID");
  absl::StatusOr<Json> kvm = qmp.Execute("query-kvm", nullptr, deadline);
  if (!kvm.ok()) return kvm.status();
  guest.kvm = BoolAt(*kvm, "enabled").value_or(false);
  absl::StatusOr<Json> state = qmp.Execute("query-status", nullptr, deadline);
  if (!state.ok()) return state.status();
  guest.run_state = StringAt(*state, "status");
  absl::StatusOr<Json> memory = qmp.Execute("query-memory-size-summary", nullptr, deadline);
  if (!memory.ok()) return memory.status();
  guest.ram_bytes =
      UintAt(*memory, "base-memory").value_or(0) + UintAt(*memory, "plugged-memory").value_or(0);
  if (guest.run_state.empty() || guest.ram_bytes == 0) {
    return absl::InvalidArgumentError(absl::StrCat(
        "QMP: ", qmp.path(), ": no run state or no RAM size: ", ToText(*state), ToText(*memory)));
  }
  if (absl::Status status = ReadBackends(qmp, guest, deadline); !status.ok()) return status;
  return guest;
}

absl::StatusOr<Findings> CheckTrackable(QmpClient& qmp, const GuestInfo& guest,
                                        absl::Time deadline) {
  Findings findings;
  if (guest.run_state == "inmigrate") {
    findings.problems.push_back({"this QEMU waits for an incoming migration: it has no guest yet",
                                 "name the monitor of the QEMU that runs the guest"});
  }
  CheckBackends(guest, findings.problems);
  absl::Status status = CheckCapability(qmp, deadline, findings.problems);
  if (status.ok()) status = CheckMigration(qmp, deadline, findings.problems);
  if (status.ok()) status = CheckDevices(qmp, deadline, findings);
  if (!status.ok()) return status;
  findings.may_nest = guest.kvm && MayNest(qmp, deadline);
  if (findings.may_nest) findings.warnings.push_back(kNestedPossible);
  return findings;
}

absl::StatusOr<Findings> CheckTarget(QmpClient& qmp, const GuestInfo& target,
                                     absl::Span<const RamBackend> source, absl::Time deadline) {
  Findings findings;
  if (target.run_state != "inmigrate") {
    findings.problems.push_back(
        {absl::StrCat("the target QEMU is '", target.run_state, "', not waiting for a guest"),
         "start it with -incoming defer -S and the same machine and devices as the source"});
  }
  if (!SameLayout(target.backends, source)) {
    findings.problems.push_back(
        {absl::StrCat("the source's RAM backends are ", ListBackends(source),
                      " bytes, the target's ", ListBackends(target.backends)),
         "give the target the same -object ids and sizes"});
  }
  CheckBackends(target, findings.problems);
  absl::StatusOr<PeerProcess> process = PeerProcess::Identify(qmp, deadline);
  if (!process.ok()) return process.status();
  absl::StatusOr<std::vector<std::string>> arguments = process->CommandLine();
  if (!arguments.ok()) return arguments.status();
  if (!HasStoppedOption(*arguments)) {
    findings.problems.push_back(
        {"the target QEMU was started without -S: it would run the guest by "
         "itself as soon as it is loaded",
         "add -S to its arguments"});
  }
  absl::Status status = CheckCapability(qmp, deadline, findings.problems);
  if (status.ok()) status = CheckDevices(qmp, deadline, findings);
  if (!status.ok()) return status;
  return findings;
}

}  // namespace presync
