#include "tools/presync/doctor.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/magic.h>
#include <sys/resource.h>
#include <sys/statfs.h>
#include <sys/utsname.h>
#include <unistd.h>

#include <cstdio>
#include <cstring>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "qemu-glue/open_guest.h"
#include "qemu-glue/qmp/peer_process.h"
#include "qemu-glue/qmp/qmp_client.h"
#include "qemu-glue/ram_file_users.h"
#include "tools/common/local_api.h"
#include "tools/common/units.h"
#include "tools/presync/disk_locks.h"
#include "tools/presync/qemu_users.h"
#include "tools/presync/unit_restart.h"
#include "transport/clock.h"
#include "transport/printable.h"
#include "transport/rdma/rdma_devices.h"
#include "transport/rdma/rdma_link.h"
#include "transport/unique_fd.h"

namespace presync {
namespace {

using Level = Finding::Level;

constexpr absl::Duration kTimeout = absl::Seconds(10);

Finding ExamineKernel() {
  utsname name = {};
  ::uname(&name);
  int major = 0;
  int minor = 0;
  std::sscanf(name.release, "%d.%d", &major, &minor);
  const std::string detail = absl::StrCat("Linux ", name.release);
  if (major > 6 || (major == 6 && minor >= 7)) {
    return Good("kernel", detail + ": dirty log uffd-async");
  }
  if (major == 6 || (major == 5 && minor >= 19)) {
    return Note("kernel", detail + ": dirty log uffd-handler, a write fault costs more",
                "Linux 6.7 or later (Debian 12: the kernel of bookworm-backports) has uffd-async");
  }
  return Bad("kernel", detail + " is too old to track writes to shared memory",
             "needs 5.19 or later, better 6.7");
}

Finding ExamineUserfaultfd() {
  const UniqueFd device(::open("/dev/userfaultfd", O_RDWR | O_CLOEXEC));
  if (device.valid())
    return Good("userfaultfd",
                "/dev/userfaultfd opens; it is passed on to QEMU for the dirty log uffd-handler");
  return Note("userfaultfd", absl::StrCat("/dev/userfaultfd: ", std::strerror(errno)),
              "uffd-async works without it; for uffd-handler run presyncd as root");
}

constexpr char kMemlockRemedy[] =
    "an RDMA link locks all of a guest's memory, once a device: LimitMEMLOCK=infinity in "
    "presyncd's unit, ulimit -l unlimited before it is started by hand, or CAP_IPC_LOCK for it";

Finding ExamineMemlock() {
  rlimit limit = {};
  ::getrlimit(RLIMIT_MEMLOCK, &limit);
  if (limit.rlim_cur == RLIM_INFINITY || ::geteuid() == 0) {
    return Good("memlock", "no limit for this user");
  }
  const std::string detail =
      absl::StrCat("this user may lock ", FormatBytes(limit.rlim_cur), " (RLIMIT_MEMLOCK)");
  if (ListRdmaDevices().empty()) return Good("memlock", detail + "; there is no RDMA device");
  return Note("memlock", detail, kMemlockRemedy);
}

std::string DescribePort(const RdmaDevice& device, const RdmaPort& port) {
  return absl::StrCat(device.name, ": port ", port.number, " ", port.state, ", ",
                      device.iwarp                    ? "iWARP"
                      : port.link_layer == "Ethernet" ? "RoCE"
                                                      : "InfiniBand",
                      port.rate.empty() ? "" : ", ", port.rate, port.netdev.empty() ? "" : ", on ",
                      port.netdev);
}

std::vector<Finding> ExamineRdma() {
  std::vector<Finding> findings;
  for (const RdmaDevice& device : ListRdmaDevices()) {
    for (const RdmaPort& port : device.ports) {
      const std::string detail = DescribePort(device, port);
      findings.push_back(port.active ? Good("RDMA", detail)
                                     : Note("RDMA", detail,
                                            "set its network device up, or look at "
                                            "the cable and the switch"));
    }
  }
  if (findings.empty()) {
    return {Good("RDMA", absl::StrCat("no device in ", kRdmaSysfs, "; TCP is used"))};
  }
  const UniqueFd manager(::open("/dev/infiniband/rdma_cm", O_RDWR | O_CLOEXEC));
  if (!manager.valid()) {
    findings.push_back(Note("RDMA", absl::StrCat("/dev/infiniband/rdma_cm: ", std::strerror(errno)),
                            "modprobe rdma_ucm; presyncd must be allowed to open it"));
  }
  // Without a library both ends refuse; the text says so.
  if (absl::Status s = CheckRdma({}); !s.ok()) {
    findings.push_back(Note("RDMA", std::string(s.message()), ""));
  }
  return findings;
}

Finding ExamineShm() {
  struct statfs fs = {};
  if (::statfs("/dev/shm", &fs) != 0 || fs.f_type != TMPFS_MAGIC) {
    return Bad("/dev/shm", "is no tmpfs", "mount one, or set ram_folder to a tmpfs or hugetlbfs");
  }
  const uint64_t free_bytes = uint64_t{fs.f_bavail} * static_cast<uint64_t>(fs.f_bsize);
  return Good("/dev/shm", absl::StrCat("tmpfs with ", FormatBytes(free_bytes), " free for guests"));
}

std::vector<Finding> ExamineDaemon(const std::string& socket) {
  const absl::StatusOr<nlohmann::json> answer =
      CallLocal(socket, {{"command", "status"}}, MonotonicNow() + kTimeout);
  if (!answer.ok() || !JsonToStatus(*answer).ok()) {
    return {Bad("presyncd", std::string(answer.status().message()),
                "systemctl start presyncd; journalctl -u presyncd says why it does not start")};
  }
  std::vector<Finding> findings = {Good("presyncd", "answers at " + socket)};
  for (Finding& each : JudgeQemuUsers(answer->value("qemu", nlohmann::json::object()))) {
    findings.push_back(std::move(each));
  }
  return findings;
}

std::vector<std::string> OthersInMemory(QmpClient& qmp, const GuestInfo& info,
                                        absl::Time deadline) {
  const absl::StatusOr<PeerProcess> process = PeerProcess::Identify(qmp, deadline);
  if (!process.ok()) return {};
  std::vector<std::string> paths;
  for (const RamBackend& backend : info.backends) paths.push_back(backend.path);
  return FindRamFileUsers(paths, process->pid());
}

const char* LevelName(Level level) {
  switch (level) {
    case Level::kGood:
      return "ok";
    case Level::kNote:
      return "note";
    default:
      return "problem";
  }
}

}  // namespace

std::vector<Finding> ExamineHost(const std::string& socket) {
  std::vector<Finding> findings = {ExamineKernel(), ExamineUserfaultfd(), ExamineMemlock()};
  for (Finding& finding : ExamineRdma()) findings.push_back(std::move(finding));
  findings.push_back(ExamineShm());
  for (Finding& finding : ExamineDaemon(socket)) findings.push_back(std::move(finding));
  return findings;
}

std::vector<Finding> ExamineGuest(const std::string& qmp_path, const std::string& glue) {
  const absl::Time deadline = MonotonicNow() + kTimeout;
  absl::StatusOr<std::unique_ptr<QmpClient>> qmp = QmpClient::Connect(qmp_path, deadline);
  if (!qmp.ok()) {
    return {Bad(
        "monitor", std::string(qmp.status().message()),
        "start QEMU with a monitor for presync alone: -qmp unix:PATH,server=on,wait=off; a guest "
        "that is being kept in sync has it in use")};
  }
  absl::StatusOr<GuestInfo> info = DescribeGuest(**qmp, deadline);
  if (!info.ok()) return {Bad("guest", std::string(info.status().message()), "")};
  std::vector<Finding> findings;
  findings.push_back(Good(
      "QEMU", absl::StrCat(info->version.major, ".", info->version.minor, ".", info->version.micro,
                           info->kvm ? ", KVM" : ", TCG", ", ", info->run_state, ", ",
                           info->ram_bytes >> 20, " MiB in ", info->backends.size(), " backends")));
  absl::StatusOr<Findings> trackable = CheckTrackable(**qmp, *info, deadline);
  if (!trackable.ok()) {
    findings.push_back(Bad("guest", std::string(trackable.status().message()), ""));
    return findings;
  }
  for (const Problem& p : trackable->problems) findings.push_back(Bad("guest", p.what, p.remedy));
  for (const std::string& note : trackable->notes) findings.push_back(Note("guest", note, ""));
  for (const std::string& warning : trackable->warnings) {
    findings.push_back(Note("guest", warning, ""));
  }
  for (const std::string& other : OthersInMemory(**qmp, *info, deadline)) {
    findings.push_back(Note("guest", other, ""));
  }
  if (std::optional<Finding> restart = ExamineRestart((*qmp)->peer_pid())) {
    findings.push_back(*std::move(restart));
  }
  for (Finding& finding : ExamineDisks(**qmp, deadline)) findings.push_back(std::move(finding));
  if (!trackable->problems.empty()) return findings;

  qmp->reset();  // a monitor serves one client at a time
  absl::StatusOr<OpenedGuest> opened =
      OpenGuest({.qmp_path = qmp_path, .glue_path = glue}, MonotonicNow() + kTimeout);
  if (opened.ok()) {
    findings.push_back(
        Good("dirty log", absl::StrCat(std::string(opened->log->name()), ", proved")));
  } else {
    findings.push_back(Bad("dirty log", std::string(opened.status().message()), ""));
  }
  return findings;
}

std::string FindingText(const Finding& finding) {
  std::string text = absl::StrFormat("%-8s %-12s %s\n", LevelName(finding.level), finding.what,
                                     PrintableText(finding.detail));
  if (!finding.remedy.empty()) {
    absl::StrAppendFormat(&text, "%21s -> %s\n", "", PrintableText(finding.remedy));
  }
  return text;
}

int RunDoctor(const DoctorOptions& options) {
  std::vector<Finding> findings = ExamineHost(options.socket);
  if (!options.qmp.empty()) {
    for (Finding& finding : ExamineGuest(options.qmp, options.glue)) {
      findings.push_back(std::move(finding));
    }
  }
  for (Finding& finding : ExamineLibvirt(options.socket, options.domain)) {
    findings.push_back(std::move(finding));
  }
  nlohmann::json json = nlohmann::json::array();
  int problems = 0;
  for (const Finding& finding : findings) {
    problems += finding.level == Level::kProblem;
    json.push_back({{"level", LevelName(finding.level)},
                    {"what", finding.what},
                    {"detail", finding.detail},
                    {"remedy", finding.remedy}});
    if (options.json) continue;
    std::printf("%s", FindingText(finding).c_str());
  }
  if (options.json) std::printf("%s\n", json.dump().c_str());
  return problems == 0 ? 0 : 1;
}

RunCommand AddDoctor(CLI::App* app, CommandContext* context) {
  auto o = std::make_shared<DoctorOptions>();
  app->add_option("--qmp", o->qmp, "Also look at the QEMU behind this monitor");
  app->add_option("--domain", o->domain, "Also look at this domain of libvirt's");
  app->add_option("--glue", o->glue, "The plug-in's socket, if it is not found by itself");
  return [o, context] {
    o->json = context->json;
    o->socket = context->socket;
    return RunDoctor(*o);
  };
}

}  // namespace presync
