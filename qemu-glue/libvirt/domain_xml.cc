#include "qemu-glue/libvirt/domain_xml.h"

#include <algorithm>
#include <pugixml.hpp>
#include <sstream>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"

namespace presync {
namespace {

constexpr char kNamespace[] = "http://libvirt.org/schemas/domain/qemu/1.0";
constexpr char kMonitorId[] = "presync";

DomainSockets Sockets(const std::string& base) {
  return {.qmp = base + ".qmp", .glue = base + ".glue", .stream = base + ".stream"};
}

// QEMU's arguments, as pairs of an option and its value.
using Arguments = std::vector<std::pair<std::string, std::string>>;

Arguments PresyncArguments(const DomainSockets& sockets, const std::string& plugin) {
  return {{"-plugin", absl::StrCat(plugin, ",socket=", sockets.glue)},
          {"-chardev",
           absl::StrCat("socket,id=", kMonitorId, ",path=", sockets.qmp, ",server=on,wait=off")},
          {"-mon", absl::StrCat("chardev=", kMonitorId, ",mode=control")}};
}

// Whether a value of QEMU's command line is one that presync put there.
bool IsOurs(absl::string_view value) {
  return absl::StrContains(value, "presync_glue.so") ||
         absl::StrContains(value, absl::StrCat("id=", kMonitorId, ",")) ||
         absl::StrContains(value, absl::StrCat("chardev=", kMonitorId, ","));
}

absl::StatusOr<pugi::xml_node> Parse(const std::string& xml, pugi::xml_document* document) {
  const pugi::xml_parse_result parsed =
      document->load_string(xml.c_str(), pugi::parse_full & ~pugi::parse_eol);
  const pugi::xml_node domain = document->child("domain");
  if (parsed && domain) return domain;
  return absl::InvalidArgumentError(absl::StrCat("this is no libvirt domain's XML: ",
                                                 parsed ? "no <domain>" : parsed.description()));
}

bool HasArgument(const pugi::xml_node& domain, const std::string& value) {
  for (const pugi::xml_node& arg : domain.child("qemu:commandline").children("qemu:arg")) {
    if (value == arg.attribute("value").as_string()) return true;
  }
  return false;
}

bool HasPlugin(const pugi::xml_node& domain, const std::string& glue) {
  for (const pugi::xml_node& arg : domain.child("qemu:commandline").children("qemu:arg")) {
    const absl::string_view value = arg.attribute("value").as_string();
    if (absl::StrContains(value, "presync_glue.so,") &&
        absl::EndsWith(value, absl::StrCat("socket=", glue))) {
      return true;
    }
  }
  return false;
}

constexpr char kAdd[] =
    "presync libvirt xml NAME shows what to add, --apply adds it for the next start";

void CheckMemory(const pugi::xml_node& domain, std::vector<Problem>* problems) {
  const pugi::xml_node backing = domain.child("memoryBacking");
  if (backing.child("hugepages")) {
    problems->push_back(
        {"its memory is on huge pages: writes would be seen by whole huge pages only, and libvirt "
         "leaves no name of the file by which another one could take its place on the target",
         "take <hugepages/> out of <memoryBacking>; transparent huge pages on the tmpfs (huge=) "
         "are no obstacle"});
  }
  const std::string type = backing.child("source").attribute("type").as_string("anonymous");
  if (type == "memfd") {
    problems->push_back(
        {"its memory is a memfd, which has no name: QEMU's migration would send it a second time, "
         "and nothing could take its place on the target before QEMU starts",
         "use <source type='file'/> in <memoryBacking> and memory_backing_dir on a tmpfs: it is as "
         "fast"});
  } else if (type != "file") {
    problems->push_back({"its memory is in no file", kAdd});
  }
  if (std::string(backing.child("access").attribute("mode").as_string()) != "shared") {
    problems->push_back({"its memory is private to QEMU", kAdd});
  }
}

pugi::xml_node ChildOf(pugi::xml_node parent, const char* name) {
  const pugi::xml_node child = parent.child(name);
  return child ? child : parent.append_child(name);
}

void SetAttribute(pugi::xml_node node, const char* name, const char* value) {
  pugi::xml_attribute attribute = node.attribute(name);
  if (!attribute) attribute = node.append_attribute(name);
  attribute.set_value(value);
}

// Takes out what an earlier AddPresync put in. An option and its value are two elements.
void RemoveOurs(pugi::xml_node command_line) {
  pugi::xml_node before;
  pugi::xml_node arg = command_line.child("qemu:arg");
  while (arg) {
    const pugi::xml_node next = arg.next_sibling("qemu:arg");
    if (before && IsOurs(arg.attribute("value").as_string())) {
      command_line.remove_child(before);
      command_line.remove_child(arg);
      before = {};
    } else {
      before = arg;
    }
    arg = next;
  }
}

}  // namespace

DomainSockets SocketsOf(const std::string& folder, const std::string& uuid) {
  return Sockets(absl::StrCat(folder, "/libvirt-", uuid));
}

DomainSockets OldSocketsOf(const std::string& folder, const std::string& uuid) {
  return Sockets(absl::StrCat(folder, "/", uuid));
}

DomainSockets SocketsIn(const std::string& xml, const std::string& folder,
                        const std::string& uuid) {
  pugi::xml_document document;
  const absl::StatusOr<pugi::xml_node> domain = Parse(xml, &document);
  const DomainSockets old = OldSocketsOf(folder, uuid);
  return domain.ok() && HasPlugin(*domain, old.glue) ? old : SocketsOf(folder, uuid);
}

absl::StatusOr<DomainNames> NamesIn(const std::string& xml) {
  pugi::xml_document document;
  absl::StatusOr<pugi::xml_node> domain = Parse(xml, &document);
  if (!domain.ok()) return domain.status();
  DomainNames names = {.name = domain->child_value("name"),
                       .uuid = domain->child_value("uuid"),
                       .id = domain->attribute("id").as_string()};
  if (names.name.empty() || names.uuid.empty()) {
    return absl::InvalidArgumentError("this domain's XML has no name or no UUID");
  }
  return names;
}

absl::StatusOr<std::vector<Problem>> CheckDomain(const std::string& xml,
                                                 const DomainSockets& sockets) {
  pugi::xml_document document;
  absl::StatusOr<pugi::xml_node> domain = Parse(xml, &document);
  if (!domain.ok()) return domain.status();
  std::vector<Problem> problems;
  CheckMemory(*domain, &problems);
  if (!HasPlugin(*domain, sockets.glue)) {
    problems.push_back(
        {absl::StrCat("its QEMU has no plug-in of presync's at ", sockets.glue), kAdd});
  }
  for (const auto& [option, value] : PresyncArguments(sockets, "")) {
    if (option != "-plugin" && !HasArgument(*domain, value)) {
      problems.push_back(
          {absl::StrCat("its QEMU has no monitor for presync (", option, " ", value, ")"), kAdd});
    }
  }
  return problems;
}

absl::StatusOr<std::string> AddPresync(const std::string& xml, const DomainSockets& sockets,
                                       const std::string& plugin) {
  pugi::xml_document document;
  absl::StatusOr<pugi::xml_node> found = Parse(xml, &document);
  if (!found.ok()) return found.status();
  pugi::xml_node domain = *found;
  if (domain.child("memoryBacking").child("hugepages")) {
    return absl::FailedPreconditionError(
        "this domain's memory is on huge pages, whose writes would be seen by whole huge pages "
        "only: take <hugepages/> out of its <memoryBacking> first");
  }
  SetAttribute(domain, "xmlns:qemu", kNamespace);
  const pugi::xml_node backing = ChildOf(domain, "memoryBacking");
  SetAttribute(ChildOf(backing, "source"), "type", "file");
  SetAttribute(ChildOf(backing, "access"), "mode", "shared");
  pugi::xml_node command_line = ChildOf(domain, "qemu:commandline");
  RemoveOurs(command_line);
  for (const auto& [option, value] : PresyncArguments(sockets, plugin)) {
    for (const std::string& text : {option, value}) {
      command_line.append_child("qemu:arg").append_attribute("value").set_value(text.c_str());
    }
  }
  std::ostringstream out;
  document.save(out, "  ", pugi::format_default | pugi::format_no_declaration);
  return out.str();
}

std::string PresyncElements(const DomainSockets& sockets, const std::string& plugin) {
  std::string text = absl::StrCat("<domain ... xmlns:qemu='", kNamespace,
                                  "'>\n"
                                  "  <memoryBacking>\n"
                                  "    <source type='file'/>\n"
                                  "    <access mode='shared'/>\n"
                                  "  </memoryBacking>\n"
                                  "  <qemu:commandline>\n");
  for (const auto& [option, value] : PresyncArguments(sockets, plugin)) {
    absl::StrAppend(&text, "    <qemu:arg value='", option, "'/>\n    <qemu:arg value='", value,
                    "'/>\n");
  }
  return text + "  </qemu:commandline>\n</domain>";
}

}  // namespace presync
