#include "qemu-glue/discovery_devices.h"

#include <algorithm>
#include <utility>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/strip.h"

namespace presync {
namespace {

// A guest with more devices than this, or nested deeper, is not one that QEMU can build; the limits
// only bound what a broken monitor can make us do.
constexpr int kMaxDepth = 8;
constexpr int kMaxNodes = 20000;

struct Rule {
  const char* part;  // of a QOM type or of a line of `info network`
  const char* why;
  const char* remedy;
  bool writes_unseen = false;
};

// The dirty log sees writes through QEMU's own page tables, and nothing else.
constexpr Rule kRules[] = {
    {"vfio", "the device writes guest RAM by DMA, which the dirty log does not see",
     "detach the device before mirroring (hot-unplug), or use an emulated or virtio one", true},
    {"iommufd", "devices behind it write guest RAM by DMA, which the dirty log does not see",
     "detach the device before mirroring", true},
    {"vhost-user", "another process writes guest RAM through a mapping of its own, unseen",
     "use the in-kernel (vhost=on) or QEMU's own back end instead", true},
    {"vhost-scsi", "the kernel reads the disk into guest pages that it has pinned, unseen",
     "use virtio-scsi with scsi-hd, or virtio-blk", true},
    {"vhost-vdpa", "the device writes guest RAM by DMA, which the dirty log does not see",
     "use virtio with a tap or QEMU's own back end instead", true},
    {"virtio-mem", "it takes memory from the guest and gives it back while the guest runs",
     "use plain RAM or pc-dimm devices"},
    {"ivshmem", "other guests write its memory, unseen", "remove the device", true},
    {"pvrdma", "the device writes guest RAM by DMA, which the dirty log does not see",
     "remove the device", true},
    {"memory-backend-epc", "SGX memory can't be read from outside", "remove the SGX memory"},
    {"sev-guest", "the guest's memory is encrypted", "use a guest without memory encryption"},
    {"sev-snp-guest", "the guest's memory is encrypted", "use a guest without memory encryption"},
    {"tdx-guest", "the guest's memory is encrypted", "use a guest without memory encryption"},
};

// Adds what is to be said about something of this kind, and whether anything was.
bool Judge(const std::string& text, const std::string& where, Findings& findings) {
  for (const Rule& rule : kRules) {
    if (!absl::StrContains(text, rule.part)) continue;
    findings.problems.push_back(
        {absl::StrCat(where, ": ", rule.why), rule.remedy, rule.writes_unseen});
    return true;
  }
  if (!absl::StrContains(text, "virtio-balloon") && !absl::StrContains(text, "hv-balloon")) {
    return false;
  }
  findings.notes.push_back(absl::StrCat(
      where,
      ": pages that the balloon or free-page reporting takes become holes; presync sends "
      "them as zeros"));
  findings.memory_may_be_discarded = true;
  return true;
}

// Visits every object below `root`, parents first, by QOM's child<> properties. A device that
// itself is worth a word is not entered: its parts say nothing new.
absl::Status Walk(QmpClient& qmp, const std::string& root, int max_depth, absl::Time deadline,
                  Findings& findings) {
  std::vector<std::pair<std::string, int>> pending = {{root, 0}};
  int nodes = 0;
  while (!pending.empty()) {
    auto [path, depth] = std::move(pending.back());
    pending.pop_back();
    absl::StatusOr<Json> properties = qmp.Execute("qom-list", {{"path", path}}, deadline);
    // A device may be unplugged between the listing of its parent and this one.
    if (absl::IsFailedPrecondition(properties.status())) continue;
    if (!properties.ok()) return properties.status();
    for (const Json& property : *properties) {
      const std::string type = ChildType(property);
      if (type.empty() || absl::StartsWith(type, "memory-region") || type == "irq") continue;
      if (++nodes > kMaxNodes) {
        return absl::InvalidArgumentError(
            absl::StrCat("QMP: ", qmp.path(), ": more than ", kMaxNodes, " objects below ", root));
      }
      const std::string child = absl::StrCat(path, "/", StringAt(property, "name"));
      const bool judged = Judge(type, absl::StrCat(type, " (", child, ")"), findings);
      if (!judged && depth + 1 < max_depth) {
        pending.emplace_back(child, depth + 1);
      }
    }
  }
  return absl::OkStatus();
}

// Only the human monitor tells which network back ends there are.
absl::Status CheckNetwork(QmpClient& qmp, absl::Time deadline, Findings& findings) {
  absl::StatusOr<Json> text =
      qmp.Execute("human-monitor-command", {{"command-line", "info network"}}, deadline);
  if (!text.ok() && !absl::IsFailedPrecondition(text.status())) return text.status();
  if (!text.ok() || !text->is_string()) {
    findings.problems.push_back(
        {absl::StrCat("can't look at the guest's network back ends: ",
                      text.ok() ? "`info network` gives no text" : text.status().message()),
         "use a QEMU whose human monitor has `info network`"});
    return absl::OkStatus();
  }
  std::string_view rest = *text->get_ptr<const std::string*>();
  while (!rest.empty()) {
    const size_t end = std::min(rest.find('\n'), rest.size());
    const std::string line(rest.substr(0, end));
    rest.remove_prefix(std::min(end + 1, rest.size()));
    // Names are the operator's own; only the back end's type counts.
    const size_t type = line.find("type=");
    if (type != std::string::npos) {
      (void)Judge(line.substr(type, line.find(',', type) - type), absl::StrCat("network: ", line),
                  findings);
    }
  }
  return absl::OkStatus();
}

// Block drivers that have a device write into the buffers of a request, which are guest pages, by
// DMA or through another process's mapping (QEMU's block/nvme.c, block/blkio.c): an ordinary disk
// in front of them does not show it.
constexpr const char* kUnseenDrivers[] = {"nvme",
                                          "nvme-io_uring",
                                          "io_uring",
                                          "virtio-blk-vfio-pci",
                                          "virtio-blk-vhost-user",
                                          "virtio-blk-vhost-vdpa"};

absl::Status CheckBlockNodes(QmpClient& qmp, absl::Time deadline, Findings& findings) {
  absl::StatusOr<Json> nodes = qmp.Execute("query-named-block-nodes", {{"flat", true}}, deadline);
  if (absl::IsFailedPrecondition(nodes.status())) return absl::OkStatus();
  if (!nodes.ok()) return nodes.status();
  for (const Json& node : *nodes) {
    const std::string driver = StringAt(node, "drv");
    if (std::none_of(std::begin(kUnseenDrivers), std::end(kUnseenDrivers),
                     [&](const char* unseen) { return driver == unseen; })) {
      continue;
    }
    findings.problems.push_back(
        {absl::StrCat("disk back end '", StringAt(node, "node-name"), "' (driver ", driver,
                      "): it has its device write guest RAM by itself, which the dirty log does "
                      "not see"),
         "use the host's own driver: -blockdev driver=host_device or file, aio=io_uring or native",
         true});
  }
  return absl::OkStatus();
}

// No obstacle, but worth knowing before a customer waits for it.
absl::Status CheckDisks(QmpClient& qmp, absl::Time deadline, Findings& findings) {
  absl::StatusOr<Json> disks = qmp.Execute("query-block", nullptr, deadline);
  if (absl::IsFailedPrecondition(disks.status())) return absl::OkStatus();
  if (!disks.ok()) return disks.status();
  std::vector<std::string> cached;
  for (const Json& disk : *disks) {
    const Json* inserted = FindMember(disk, "inserted");
    const Json* cache = inserted == nullptr ? nullptr : FindMember(*inserted, "cache");
    if (cache == nullptr || BoolAt(*cache, "direct").value_or(true)) continue;
    cached.push_back(StringAt(disk, "device").empty() ? StringAt(disk, "qdev")
                                                      : StringAt(disk, "device"));
  }
  if (cached.empty()) return absl::OkStatus();
  findings.notes.push_back(absl::StrCat(
      "disks in the host's page cache (", absl::StrJoin(cached, ", "),
      "): QEMU drops that before it runs the guest on the target, which may take some "
      "tens of ms; cache=none saves them, and two hosts never disagree about a block"));
  return absl::OkStatus();
}

}  // namespace

std::string ChildType(const Json& property) {
  const std::string type = StringAt(property, "type");
  if (!absl::StartsWith(type, "child<") || !absl::EndsWith(type, ">")) return "";
  return type.substr(6, type.size() - 7);
}

absl::Status CheckDevices(QmpClient& qmp, absl::Time deadline, Findings& findings) {
  // Devices that were asked for; those that the machine brings along, whose own parts (memory
  // regions, interrupts by the hundred) say nothing; and back ends that are objects.
  struct Root {
    const char* path;
    int max_depth;
  };
  constexpr Root kRoots[] = {{"/machine/peripheral", kMaxDepth},
                             {"/machine/peripheral-anon", kMaxDepth},
                             {"/machine/unattached", 1},
                             {"/objects", 1}};
  for (const Root& root : kRoots) {
    absl::Status status = Walk(qmp, root.path, root.max_depth, deadline, findings);
    if (!status.ok()) return status;
  }
  if (absl::Status s = CheckBlockNodes(qmp, deadline, findings); !s.ok()) return s;
  if (absl::Status s = CheckDisks(qmp, deadline, findings); !s.ok()) return s;
  return CheckNetwork(qmp, deadline, findings);
}

bool HasStoppedOption(absl::Span<const std::string> arguments) {
  // QEMU takes each option with one dash or two.
  return std::any_of(arguments.begin(), arguments.end(),
                     [](const std::string& a) { return a == "-S" || a == "--S"; });
}

}  // namespace presync
