#include "tools/presync/libvirt_commands.h"

#include <cstdio>
#include <iostream>
#include <iterator>
#include <memory>
#include <vector>

#include "absl/strings/str_cat.h"
#include "qemu-glue/libvirt/domain_xml.h"
#include "qemu-glue/libvirt/libvirt_client.h"
#include "tools/common/local_api.h"
#include "tools/presync/doctor.h"
#include "tools/presync/link_memory.h"

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

// INVALID_ARGUMENT: a presyncd of a version that does not say which files it means.
absl::StatusOr<std::vector<MemoryFile>> FilesIn(const Json& answer) {
  std::vector<MemoryFile> files;
  for (const Json& file : answer.value("files", Json::array())) {
    files.push_back({.path = TextOr(file, "path", ""),
                     .name = TextOr(file, "name", ""),
                     .device = static_cast<dev_t>(NumberOr(file, "device", 0)),
                     .inode = static_cast<ino_t>(NumberOr(file, "inode", 0))});
    if (files.back().inode != 0) continue;
    return absl::InvalidArgumentError(
        "the presyncd that runs here is older than this presync: restart it (systemctl restart "
        "presyncd)");
  }
  return files;
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
  const absl::StatusOr<std::vector<MemoryFile>> files = FilesIn(answer.json);
  if (!files.ok()) return Fail(files.status(), context);
  const absl::Status linked =
      LinkMemory(TextOr(answer.json, "folder", ""), names->id, names->name, *files);
  if (!linked.ok()) return Fail(linked, context);
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
