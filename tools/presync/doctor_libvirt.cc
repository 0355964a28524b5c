// `presync doctor` about libvirt.
#include <errno.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cstring>
#include <filesystem>

#include "absl/strings/str_cat.h"
#include "qemu-glue/libvirt/domain_xml.h"
#include "qemu-glue/libvirt/libvirt_client.h"
#include "qemu-glue/libvirt/libvirt_target_host.h"
#include "tools/common/local_api.h"
#include "tools/presync/doctor.h"

namespace presync {
namespace {

constexpr char kHookFolder[] = "/etc/libvirt/hooks/qemu.d";

Finding ExamineHook() {
  std::error_code error;
  for (const auto& entry : std::filesystem::directory_iterator(kHookFolder, error)) {
    if (entry.path().filename().string().find("presync") == std::string::npos) continue;
    if (::access(entry.path().c_str(), X_OK) == 0) return Good("hook", entry.path().string());
    return Bad("hook", entry.path().string() + " can't be executed",
               "chmod 755 " + entry.path().string());
  }
  return Bad("hook", absl::StrCat(kHookFolder, " has no hook of presync's"),
             "install presync-libvirt (or tools/libvirt/presync-hook there); libvirtd sees a new "
             "folder after a restart only");
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

void ExamineDomain(const LibvirtClient& libvirt, const std::string& name,
                   const std::string& socket_folder, std::vector<Finding>* findings) {
  const absl::StatusOr<DomainInfo> domain = libvirt.Find(name);
  if (!domain.ok()) {
    findings->push_back(Bad("domain", std::string(domain.status().message()), "virsh list --all"));
    return;
  }
  const absl::StatusOr<std::vector<Problem>> problems =
      CheckDomain(domain->xml, SocketsOf(socket_folder, domain->uuid));
  if (!problems.ok()) {
    findings->push_back(Bad("domain", std::string(problems.status().message()), ""));
    return;
  }
  for (const Problem& problem : *problems) {
    findings->push_back(Bad("domain", problem.what, problem.remedy));
  }
  if (problems->empty()) {
    findings->push_back(
        Good("domain", absl::StrCat(domain->name, " (", domain->uuid, "), ",
                                    domain->active ? "runs" : "does not run", ", its XML is fit")));
  }
  if (domain->active && problems->empty()) {
    const DomainSockets sockets = SocketsOf(socket_folder, domain->uuid);
    for (Finding& finding : ExamineGuest(sockets.qmp, sockets.glue)) {
      findings->push_back(std::move(finding));
    }
  }
}

}  // namespace

std::vector<Finding> ExamineLibvirt(const std::string& socket, const std::string& domain) {
  const absl::StatusOr<nlohmann::json> answer =
      CallLocal(socket, {{"command", "libvirt"}}, absl::Now() + absl::Seconds(10));
  if (!answer.ok()) return {};  // what is wrong with presyncd is said already
  if (absl::Status s = JsonToStatus(*answer); !s.ok()) {
    if (domain.empty()) return {Good("libvirt", "not used: presyncd.toml has no [libvirt]")};
    return {Bad("libvirt", std::string(s.message()), "")};
  }
  const LibvirtClient libvirt(TextOr(*answer, "uri", ""));
  const std::string socket_folder = TextOr(*answer, "socket_folder", "");
  std::vector<Finding> findings;
  const absl::StatusOr<std::string> version = libvirt.Version();
  findings.push_back(version.ok()
                         ? Good("libvirt", absl::StrCat(*version, " at ", libvirt.uri()))
                         : Bad("libvirt", std::string(version.status().message()),
                               "is libvirtd there, and may this user use it (group libvirt)?"));
  const std::string memory = TextOr(*answer, "memory_backing_dir", "");
  const absl::Status on_tmpfs = CheckMemoryFolder(memory);
  findings.push_back(on_tmpfs.ok() ? Good("memory", memory + " is on a tmpfs")
                                   : Bad("memory", std::string(on_tmpfs.message()), ""));
  findings.push_back(ExamineHook());
  findings.push_back(ExamineSocketFolder(socket_folder));
  findings.push_back(ExaminePlugin(TextOr(*answer, "plugin", "")));
  if (!domain.empty() && version.ok()) ExamineDomain(libvirt, domain, socket_folder, &findings);
  return findings;
}

}  // namespace presync
