// `presync doctor` about libvirt.
#include <errno.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "qemu-glue/libvirt/domain_xml.h"
#include "qemu-glue/libvirt/libvirt_client.h"
#include "qemu-glue/libvirt/libvirt_target_host.h"
#include "tools/common/local_api.h"
#include "tools/presync/doctor.h"
#include "transport/clock.h"

namespace presync {
namespace {

using Json = nlohmann::json;

constexpr char kHookFolder[] = "/etc/libvirt/hooks/qemu.d";
constexpr char kQemuConf[] = "/etc/libvirt/qemu.conf";
// libvirt's AppArmor rules for its QEMUs, and where what others add to them belongs.
constexpr char kLibvirtRules[] = "/etc/apparmor.d/abstractions/libvirt-qemu";
constexpr char kLocalRules[] = "/etc/apparmor.d/local/abstractions/libvirt-qemu";
constexpr char kOurRules[] = "/etc/apparmor.d/abstractions/presync-libvirt";
constexpr char kInclude[] = "#include if exists <abstractions/presync-libvirt>";

// x-ignore-shared, without which a guest's RAM would be sent a second time.
Finding ExamineQemu(const LibvirtClient& libvirt) {
  const absl::StatusOr<QmpVersion> qemu = libvirt.Qemu();
  if (!qemu.ok()) {
    return Bad("QEMU", std::string(qemu.status().message()),
               "install qemu-system-x86; virsh version says what libvirt finds");
  }
  const std::string version = absl::StrCat(qemu->major, ".", qemu->minor, ".", qemu->micro);
  if (qemu->major >= 4) {
    return Good("QEMU", version + ", by libvirt: can leave RAM out of a migration");
  }
  return Bad("QEMU", version + ", by libvirt, can't leave RAM out of a migration (x-ignore-shared)",
             "use QEMU 4.0 or later");
}

Finding ExamineMemory(const std::string& folder) {
  if (const absl::Status on_tmpfs = CheckMemoryFolder(folder); !on_tmpfs.ok()) {
    return Bad("memory", std::string(on_tmpfs.message()), "");
  }
  const std::string libvirts = ReadMemoryBackingDir();
  // Only what can be read can contradict.
  if (::access(kQemuConf, R_OK) == 0 && libvirts != folder) {
    return Bad("memory",
               absl::StrCat("memory_backing_dir is ", folder, " in presyncd.toml and ", libvirts,
                            " in ", kQemuConf),
               absl::StrCat("take it out of presyncd.toml, or set both alike; restart libvirtd "
                            "and presyncd, and start the guests anew"));
  }
  return Good("memory", folder + " is on a tmpfs");
}

bool HasLine(const std::string& path, absl::string_view wanted) {
  std::ifstream file(path);
  std::string line;
  while (std::getline(file, line)) {
    if (line == wanted) return true;
  }
  return false;
}

Finding ExamineAppArmor() {
  if (::access(kLibvirtRules, F_OK) != 0) {
    return Good("AppArmor", "libvirt has no rules for QEMU here");
  }
  const std::string remedy =
      absl::StrCat("install presync-libvirt; or by hand: the rules to ", kOurRules,
                   ", and the line '", kInclude, "' into ", kLocalRules);
  if (::access(kOurRules, F_OK) != 0) {
    return Bad("AppArmor", absl::StrCat("no ", kOurRules, ": QEMU may not make presync's sockets"),
               remedy);
  }
  if (!HasLine(kLocalRules, kInclude)) {
    return Bad("AppArmor",
               absl::StrCat(kLocalRules,
                            " does not include presync's rules: QEMU may not make "
                            "presync's sockets"),
               remedy);
  }
  return Good("AppArmor", absl::StrCat(kOurRules, " is included"));
}

bool AsksMayStart(const std::string& hook) {
  std::ifstream file(hook);
  const std::string text((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
  return absl::StrContains(text, "may-start");
}

Finding ExamineHook() {
  std::error_code error;
  for (const auto& entry : std::filesystem::directory_iterator(kHookFolder, error)) {
    if (entry.path().filename().string().find("presync") == std::string::npos) continue;
    if (::access(entry.path().c_str(), X_OK) == 0) {
      return AsksMayStart(entry.path())
                 ? Good("hook", entry.path().string())
                 : Bad("hook",
                       entry.path().string() +
                           " is of an older presync: it lets a guest that moved be started again",
                       "install presync-libvirt anew");
    }
    return Bad("hook", entry.path().string() + " can't be executed",
               "chmod 755 " + entry.path().string());
  }
  return Bad("hook", absl::StrCat(kHookFolder, " has no hook of presync's"),
             "install presync-libvirt (or tools/libvirt/presync-hook there); libvirtd sees a new "
             "folder after a restart only");
}

// A guest that moved is not defined here any more where libvirt moved it whole; one that stayed
// defined is started again by the next boot, unless the hook keeps it from that.
void ExamineAutostart(const LibvirtClient& libvirt, const DomainInfo& domain,
                      std::vector<Finding>* findings) {
  const absl::StatusOr<bool> on = libvirt.StartsByItself(domain.uuid);
  if (!on.ok() || !*on) return;
  const bool refused = ExamineHook().level == Finding::Level::kGood;
  const std::string says = domain.name + " has autostart";
  findings->push_back(
      refused ? Good("autostart", says + ", and presync's hook refuses it after a move")
              : Bad("autostart", says + ": after a move the next boot starts it again here",
                    "mend the hook (above), or virsh autostart --disable " + domain.name));
}

Finding ExamineSocketFolder(const std::string& path) {
  struct stat folder = {};
  if (::stat(path.c_str(), &folder) != 0) {
    return Bad("sockets", absl::StrCat(path, ": ", std::strerror(errno)),
               "presyncd makes it: start it; or systemd-tmpfiles --create");
  }
  const bool others = (folder.st_mode & 0002) != 0;
  if (folder.st_uid == 0 && folder.st_gid == 0 && !others) {
    return Note("sockets", path + " is root's alone",
                "QEMU, which runs as the user of libvirt's qemu.conf, must be able to make sockets "
                "there: give the folder its group and mode 0770");
  }
  return Good("sockets", path);
}

Finding ExaminePlugin(const std::string& path) {
  if (::access(path.c_str(), R_OK) == 0) return Good("plug-in", path);
  return Bad("plug-in", absl::StrCat(path, ": ", std::strerror(errno)),
             "install presync-qemu, or set plugin in [libvirt]");
}

// What presyncd knows of a guest: `list` is "guests" (from here) or "incoming". Null: nothing.
Json FindGuest(const Json& status, const char* list, const char* key, const std::string& value) {
  for (const Json& guest : status.value(list, Json::array())) {
    if (TextOr(guest, key, "") == value) return guest;
  }
  return nullptr;
}

// A domain that libvirt does not know here.
Finding ExamineUnknown(const Json& status, const std::string& name, const absl::Status& error) {
  const Json guest = FindGuest(status, "incoming", "name", name);
  if (absl::IsNotFound(error) && !guest.is_null()) {
    return Good("domain", absl::StrCat(name, " is mirrored here from ", TextOr(guest, "from", "?"),
                                       " (", TextOr(guest, "state", "?"),
                                       "); libvirt gets to know it when it is launched"));
  }
  return Bad("domain", std::string(error.message()),
             "virsh list --all; on the host where it runs presync doctor looks at the domain, on "
             "the other one leave --domain out");
}

// Whether its definition has all that the guest that runs lacks.
bool NextStartIsFit(const DomainInfo& domain, const DomainSockets& sockets) {
  if (!domain.active || domain.next_xml.empty()) return false;
  const absl::StatusOr<std::vector<Problem>> problems = CheckDomain(domain.next_xml, sockets);
  return problems.ok() && problems->empty();
}

void ExamineDomain(const LibvirtClient& libvirt, const std::string& name,
                   const std::string& socket_folder, const Json& status,
                   std::vector<Finding>* findings) {
  const absl::StatusOr<DomainInfo> domain = libvirt.Find(name);
  if (!domain.ok()) {
    findings->push_back(ExamineUnknown(status, name, domain.status()));
    return;
  }
  const DomainSockets sockets = SocketsIn(domain->xml, socket_folder, domain->uuid);
  const absl::StatusOr<std::vector<Problem>> problems = CheckDomain(domain->xml, sockets);
  if (!problems.ok()) {
    findings->push_back(Bad("domain", std::string(problems.status().message()), ""));
    return;
  }
  if (!problems->empty()) {
    if (NextStartIsFit(*domain, sockets)) {
      findings->push_back(
          Bad("domain", domain->name + " runs without what presync needs; its next start has it",
              absl::StrCat("virsh shutdown ", domain->name, ", then virsh start ", domain->name)));
      return;
    }
    for (const Problem& problem : *problems) {
      findings->push_back(Bad("domain", problem.what, problem.remedy));
    }
    return;
  }
  findings->push_back(
      Good("domain", absl::StrCat(domain->name, " (", domain->uuid, "), ",
                                  domain->active ? "runs" : "does not run", ", its XML is fit")));
  if (sockets.glue != SocketsOf(socket_folder, domain->uuid).glue) {
    findings->push_back(
        Note("sockets", "they have names that AppArmor lets every guest of this host's use",
             absl::StrCat("presync libvirt xml ", domain->name,
                          " --apply; it counts from the domain's next start on, and its "
                          "migration's URI changes (docs/libvirt.md)")));
  }
  ExamineAutostart(libvirt, *domain, findings);
  if (!domain->active) return;
  const Json synced = FindGuest(status, "guests", "qmp", sockets.qmp);
  const std::string state = synced.is_null() ? "" : TextOr(synced, "state", "");
  if (!state.empty() && state != "failed" && state != "stopped" && state != "moved") {
    findings->push_back(
        Good("guest", absl::StrCat("kept in sync with ", TextOr(synced, "to", "?"), ": ", state)));
    return;
  }
  for (Finding& finding : ExamineGuest(sockets.qmp, sockets.glue)) {
    findings->push_back(std::move(finding));
  }
}

}  // namespace

std::vector<Finding> ExamineLibvirtHost(const Json& host) {
  const LibvirtClient libvirt(TextOr(host, "uri", ""));
  std::vector<Finding> findings;
  const absl::StatusOr<std::string> version = libvirt.Version();
  if (version.ok()) {
    findings.push_back(Good("libvirt", absl::StrCat(*version, " at ", libvirt.uri())));
    findings.push_back(ExamineQemu(libvirt));
  } else {
    findings.push_back(Bad("libvirt", std::string(version.status().message()),
                           "is libvirtd there, and may this user use it (group libvirt)?"));
  }
  findings.push_back(ExamineMemory(TextOr(host, "memory_backing_dir", "")));
  findings.push_back(ExamineHook());
  findings.push_back(ExamineSocketFolder(TextOr(host, "socket_folder", "")));
  findings.push_back(ExaminePlugin(TextOr(host, "plugin", "")));
  findings.push_back(ExamineAppArmor());
  return findings;
}

std::vector<Finding> ExamineLibvirt(const std::string& socket, const std::string& domain) {
  const absl::Time deadline = MonotonicNow() + absl::Seconds(10);
  const absl::StatusOr<Json> host = CallLocal(socket, {{"command", "libvirt"}}, deadline);
  if (!host.ok()) return {};  // what is wrong with presyncd is said already
  if (absl::Status s = JsonToStatus(*host); !s.ok()) {
    if (domain.empty()) return {Good("libvirt", "not used: presyncd.toml has no [libvirt]")};
    return {Bad("libvirt", std::string(s.message()), "")};
  }
  std::vector<Finding> findings = ExamineLibvirtHost(*host);
  if (domain.empty()) return findings;
  const LibvirtClient libvirt(TextOr(*host, "uri", ""));
  if (!libvirt.Version().ok()) return findings;  // said already
  const absl::StatusOr<Json> status = CallLocal(socket, {{"command", "status"}}, deadline);
  ExamineDomain(libvirt, domain, TextOr(*host, "socket_folder", ""),
                status.ok() ? *status : Json::object(), &findings);
  return findings;
}

}  // namespace presync
