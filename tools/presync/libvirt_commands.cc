#include "tools/presync/libvirt_commands.h"

#include <errno.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cstdio>
#include <cstring>
#include <filesystem>
#include <iostream>
#include <iterator>
#include <memory>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "qemu-glue/libvirt/domain_xml.h"
#include "qemu-glue/libvirt/libvirt_client.h"
#include "tools/common/local_api.h"
#include "tools/presync/doctor.h"

namespace presync {
namespace {

using Json = nlohmann::json;

// Longer than presyncd takes to ask the source.
constexpr absl::Duration kHookTimeout = absl::Seconds(25);

struct XmlOptions {
  std::string name;
  bool apply = false;
};

struct HookOptions {
  std::string name, operation;
};

// The problems of what `xml` says, one a line; empty: none.
std::string Missing(const std::string& xml, const DomainSockets& sockets) {
  const absl::StatusOr<std::vector<Problem>> problems = CheckDomain(xml, sockets);
  if (!problems.ok()) return absl::StrCat("  ", problems.status().message(), "\n");
  std::string text;
  for (const Problem& problem : *problems) absl::StrAppend(&text, "  ", problem.what, "\n");
  return text;
}

absl::Status Apply(const LibvirtClient& libvirt, const DomainInfo& domain,
                   const DomainSockets& sockets, const std::string& plugin) {
  if (domain.next_xml.empty()) {
    return absl::FailedPreconditionError(absl::StrCat(
        "the domain ", domain.name,
        " is not persistent: there is no next start. Add these elements to the XML that it is "
        "created from:\n",
        PresyncElements(sockets, plugin)));
  }
  absl::StatusOr<std::string> xml = AddPresync(domain.next_xml, sockets, plugin);
  if (!xml.ok()) return xml.status();
  return libvirt.Define(*xml);
}

// What was done, and what else has to be put where.
void PrintApplied(const DomainInfo& domain, const DomainSockets& sockets,
                  const nlohmann::json& host) {
  const char* name = domain.name.c_str();
  std::printf("%s has what presync needs from its next start on\n", name);
  if (domain.active && !Missing(domain.xml, sockets).empty()) {
    std::printf("It runs without it until then: virsh shutdown %s, then virsh start %s\n", name,
                name);
  }
  std::string missing;
  for (const Finding& finding : ExamineLibvirtHost(host)) {
    if (finding.level != Finding::Level::kGood) absl::StrAppend(&missing, FindingText(finding));
  }
  std::printf("%s%s",
              missing.empty() ? "This host has what else is needed\n" : "This host lacks:\n",
              missing.c_str());
  std::printf("Whether the host that it goes to has all of it too, presync doctor says there\n");
}

int RunXml(const XmlOptions& options, const CommandContext& context) {
  const Answer host = Ask(context, {{"command", "libvirt"}}, absl::Seconds(10));
  if (host.exit_code != kOk) return host.exit_code;
  const LibvirtClient libvirt(TextOr(host.json, "uri", ""));
  absl::StatusOr<DomainInfo> domain = libvirt.Find(options.name);
  if (!domain.ok()) return Fail(domain.status(), context);
  const DomainSockets sockets = SocketsOf(TextOr(host.json, "socket_folder", ""), domain->uuid);
  const std::string plugin = TextOr(host.json, "plugin", "");
  if (options.apply) {
    if (absl::Status s = Apply(libvirt, *domain, sockets, plugin); !s.ok()) {
      return Fail(s, context);
    }
    PrintApplied(*domain, sockets, host.json);
    return kOk;
  }
  const std::string& xml = domain->next_xml.empty() ? domain->xml : domain->next_xml;
  const std::string missing = Missing(xml, sockets);
  if (missing.empty()) {
    std::printf("%s has all that presync needs\n", domain->name.c_str());
    return kOk;
  }
  std::printf("What %s lacks:\n%s\nTo be added to its XML (virsh edit %s), or by --apply:\n%s\n",
              domain->name.c_str(), missing.c_str(), domain->name.c_str(),
              PresyncElements(sockets, plugin).c_str());
  return kFailed;
}

// The folder that libvirt made for the memory of the domain with this number: NUMBER-NAME, the name
// cut.
absl::StatusOr<std::string> DomainFolder(const std::string& parent, const std::string& id) {
  std::error_code error;
  std::string found;
  for (const auto& entry : std::filesystem::directory_iterator(parent, error)) {
    if (!absl::StartsWith(entry.path().filename().string(), id + "-")) continue;
    found = entry.path().string();
  }
  if (!found.empty() && !id.empty()) return found;
  return absl::NotFoundError(
      absl::StrCat(parent, " has no folder ", id,
                   "-*: is memory_backing_dir in presyncd.toml that of libvirt's qemu.conf?"));
}

// The mirrored memory gets the name under which QEMU will look for it, and the owner of the folder
// that libvirt made for it.
absl::Status LinkMemory(const Json& answer, const std::string& id) {
  absl::StatusOr<std::string> folder = DomainFolder(TextOr(answer, "folder", ""), id);
  if (!folder.ok()) return folder.status();
  struct stat owner = {};
  if (::stat(folder->c_str(), &owner) != 0) {
    return absl::UnavailableError(absl::StrCat(*folder, ": ", std::strerror(errno)));
  }
  for (const Json& file : answer.value("files", Json::array())) {
    const std::string from = TextOr(file, "path", "");
    const std::string to = absl::StrCat(*folder, "/", TextOr(file, "name", ""));
    if (::link(from.c_str(), to.c_str()) != 0 ||
        ::chown(to.c_str(), owner.st_uid, owner.st_gid) != 0 || ::chmod(to.c_str(), 0600) != 0) {
      return absl::UnavailableError(
          absl::StrCat("link ", from, " to ", to, ": ", std::strerror(errno)));
    }
  }
  return absl::OkStatus();
}

int RunHook(const HookOptions& options, const CommandContext& context) {
  const std::string xml((std::istreambuf_iterator<char>(std::cin)),
                        std::istreambuf_iterator<char>());
  absl::StatusOr<DomainNames> names = NamesIn(xml);
  if (!names.ok()) return Fail(names.status(), context);
  const Json request = {
      {"command", "libvirt-hook"}, {"operation", options.operation}, {"uuid", names->uuid}};
  const Answer answer = Ask(context, request, kHookTimeout);
  if (answer.exit_code != kOk) return answer.exit_code;
  if (!FlagOr(answer.json, "known", false) || options.operation != "start") return kOk;
  if (absl::Status s = LinkMemory(answer.json, names->id); !s.ok()) return Fail(s, context);
  return kOk;
}

}  // namespace

RunCommand AddLibvirt(CLI::App* app, CommandContext* context) {
  app->require_subcommand(1);
  auto xml_options = std::make_shared<XmlOptions>();
  CLI::App* xml =
      app->add_subcommand("xml", "Show what a domain's XML needs for presync, or add it");
  xml->add_option("name", xml_options->name, "The domain's name or UUID")->required();
  xml->add_flag("--apply", xml_options->apply, "Add it: it counts from the domain's next start on");
  auto hook_options = std::make_shared<HookOptions>();
  CLI::App* hook = app->add_subcommand("hook", "What libvirt's hook calls, with the XML on stdin");
  hook->add_option("name", hook_options->name, "The domain's name")->required();
  hook->add_option("operation", hook_options->operation,
                   "migrate, start, started, stopped, release")
      ->required();
  return [=] {
    return xml->parsed() ? RunXml(*xml_options, *context) : RunHook(*hook_options, *context);
  };
}

}  // namespace presync
