#include "qemu-glue/guest_shape.h"

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <map>
#include <optional>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "absl/strings/string_view.h"
#include "absl/strings/strip.h"

namespace presync {
namespace {

// QEMU's own limit on the depth of buses is far below; this one bounds what a broken monitor can
// make of a text.
constexpr size_t kMaxDepth = 64;

// The answer, or null where this QEMU has no such question.
absl::StatusOr<Json> AskIfKnown(QmpClient& qmp, const std::string& command, const Json& arguments,
                                absl::Time deadline) {
  absl::StatusOr<Json> answer = qmp.Execute(command, arguments, deadline);
  if (absl::IsFailedPrecondition(answer.status())) return Json();
  return answer;
}

absl::StatusOr<Json> GetProperty(QmpClient& qmp, const std::string& path, const char* property,
                                 absl::Time deadline) {
  return AskIfKnown(qmp, "qom-get", {{"path", path}, {"property", property}}, deadline);
}

absl::StatusOr<std::string> AskPeople(QmpClient& qmp, const char* command, absl::Time deadline) {
  absl::StatusOr<Json> text =
      AskIfKnown(qmp, "human-monitor-command", {{"command-line", command}}, deadline);
  if (!text.ok()) return text.status();
  return text->is_string() ? *text->get_ptr<const std::string*>() : std::string();
}

std::string PlainText(const Json& value) {
  return value.is_string() ? *value.get_ptr<const std::string*>() : ToText(value);
}

absl::Status AppendMachine(QmpClient& qmp, absl::Time deadline, GuestShape* shape) {
  absl::StatusOr<Json> type = GetProperty(qmp, "/machine", "type", deadline);
  if (!type.ok()) return type.status();
  if (type->is_string()) shape->push_back({"machine", PlainText(*type)});
  const QmpVersion& version = qmp.version();
  shape->push_back({"qemu", absl::StrCat(version.major, ".", version.minor, ".", version.micro)});
  absl::StatusOr<Json> kvm = AskIfKnown(qmp, "query-kvm", nullptr, deadline);
  if (!kvm.ok()) return kvm.status();
  if (const std::optional<bool> enabled = BoolAt(*kvm, "enabled")) {
    shape->push_back({"accel", *enabled ? "kvm" : "tcg"});
  }
  for (const char* name : {"smp", "memory"}) {
    absl::StatusOr<Json> values = GetProperty(qmp, "/machine", name, deadline);
    if (!values.ok()) return values.status();
    if (!values->is_object()) continue;
    for (const auto& [key, value] : values->items()) {
      shape->push_back({absl::StrCat(name, " ", key), PlainText(value)});
    }
  }
  return absl::OkStatus();
}

absl::Status AppendCpu(QmpClient& qmp, absl::Time deadline, GuestShape* shape) {
  absl::StatusOr<Json> cpus = AskIfKnown(qmp, "query-cpus-fast", nullptr, deadline);
  if (!cpus.ok()) return cpus.status();
  if (!cpus->is_array() || cpus->empty()) return absl::OkStatus();
  const std::string path = StringAt((*cpus)[0], "qom-path");
  absl::StatusOr<Json> type = GetProperty(qmp, path, "type", deadline);
  if (!type.ok()) return type.status();
  if (type->is_string()) shape->push_back({"cpu", PlainText(*type)});
  absl::StatusOr<Json> words = GetProperty(qmp, path, "feature-words", deadline);
  if (!words.ok()) return words.status();
  if (!words->is_array()) return absl::OkStatus();
  for (const Json& word : *words) {
    const uint64_t features = UintAt(word, "features").value_or(0);
    if (features == 0) continue;  // a word that an older QEMU does not know is zero, too
    shape->push_back({absl::StrCat("cpu word ", UintAt(word, "cpuid-input-eax").value_or(0), "/",
                                   UintAt(word, "cpuid-input-ecx").value_or(0), "/",
                                   StringAt(word, "cpuid-register")),
                      absl::StrCat(absl::Hex(features))});
  }
  return absl::OkStatus();
}

absl::Status AppendDisks(QmpClient& qmp, absl::Time deadline, GuestShape* shape) {
  absl::StatusOr<Json> disks = AskIfKnown(qmp, "query-block", nullptr, deadline);
  if (!disks.ok()) return disks.status();
  for (const Json& disk : *disks) {
    const std::string device = StringAt(disk, "qdev");
    const Json* inserted = FindMember(disk, "inserted");
    const Json* image = inserted == nullptr ? nullptr : FindMember(*inserted, "image");
    if (device.empty() || image == nullptr) continue;
    if (const std::optional<uint64_t> bytes = UintAt(*image, "virtual-size")) {
      shape->push_back({absl::StrCat("disk ", device), absl::StrCat(*bytes)});
    }
  }
  return absl::OkStatus();
}

// "03.0", as PCI devices have it.
bool IsSlot(absl::string_view text) {
  return text.size() == 4 && text[2] == '.' && text[3] >= '0' && text[3] <= '7';
}

// Takes `info qtree` in line by line. Its lines are indented by two for each level of buses and of
// devices; a device's properties stand below it.
class DeviceTree {
 public:
  explicit DeviceTree(GuestShape* shape) : shape_(shape) {}
  ~DeviceTree() {
    EndDevice();
    for (const auto& [key, count] : counts_) shape_->push_back({key, absl::StrCat(count)});
  }
  DeviceTree(const DeviceTree&) = delete;
  DeviceTree& operator=(const DeviceTree&) = delete;

  void Take(absl::string_view line) {
    const size_t indent = std::min(line.find_first_not_of(' '), line.size());
    absl::string_view rest = absl::StripTrailingAsciiWhitespace(line.substr(indent));
    if (absl::ConsumePrefix(&rest, "bus: ")) {
      EndDevice();
      const size_t depth = std::min(indent / 4, kMaxDepth);  // one level of device between two
      buses_.resize(depth);
      buses_.push_back(std::string(rest));
    } else if (absl::ConsumePrefix(&rest, "dev: ")) {
      EndDevice();
      const size_t depth = std::min((indent + 2) / 4, kMaxDepth);
      buses_.resize(std::min(buses_.size(), depth));
      type_ = std::string(rest.substr(0, rest.find(',')));
    } else if (absl::ConsumePrefix(&rest, "addr = ") && IsSlot(rest)) {
      slot_ = std::string(rest);
    }
  }

 private:
  void EndDevice() {
    if (type_.empty()) return;
    const std::string bus = absl::StrJoin(buses_, "/");
    if (slot_.empty()) {
      ++counts_[absl::StrCat("device ", bus, " ", type_)];
    } else {
      shape_->push_back({absl::StrCat("pci ", bus, "/", slot_), type_});
    }
    type_.clear();
    slot_.clear();
  }

  GuestShape* const shape_;
  std::vector<std::string> buses_;
  std::string type_, slot_;  // of the device that the lines are about
  std::map<std::string, int> counts_;
};

// A kind of trait, by how its key begins, and what follows when the two sides differ.
struct Kind {
  const char* key;
  const char* name;  // for people
  bool refused;      // QEMU refuses such a guest; otherwise it takes it without a word
};
constexpr Kind kKinds[] = {
    {"machine", "machine type", true},
    {"smp cpus", "smp cpus", true},
    {"smp maxcpus", "smp maxcpus", true},
    {"smp ", "smp", false},
    {"memory ", "memory", true},
    {"block ", "RAM block", true},
    {"pci ", "PCI device at", true},
    {"device ", "device", true},
    {"cpu", "CPU model", false},
    {"accel", "accelerator", false},
    {"disk ", "disk", false},
};

const Kind* KindOf(const std::string& key) {
  for (const Kind& kind : kKinds) {
    const absl::string_view begin = kind.key;
    if (absl::EndsWith(begin, " ") ? absl::StartsWith(key, begin) : key == begin) return &kind;
  }
  return nullptr;
}

std::string DiffText(const Kind& kind, const std::string& key, const std::string* here,
                     const std::string* there) {
  const absl::string_view name = absl::StripPrefix(key, kind.key);
  return absl::StrCat(kind.name, name.empty() ? "" : " ", name, ": ",
                      here == nullptr ? "none" : *here, " at the source, ",
                      there == nullptr ? "none" : *there, " on the target");
}

using Traits = std::map<std::string, std::string>;

Traits ToMap(const GuestShape& shape) {
  Traits traits;
  for (const GuestTrait& trait : shape) traits[trait.key] = trait.value;
  return traits;
}

const std::string* Find(const Traits& traits, const std::string& key) {
  const auto it = traits.find(key);
  return it == traits.end() ? nullptr : &it->second;
}

// Of 7.2.22 and 10.0.2 the first.
bool IsOlder(const std::string& a, const std::string& b) {
  const std::vector<std::string> as = absl::StrSplit(a, '.');
  const std::vector<std::string> bs = absl::StrSplit(b, '.');
  for (size_t i = 0; i < std::min<size_t>({as.size(), bs.size(), 2}); ++i) {
    int x = 0;
    int y = 0;
    if (!absl::SimpleAtoi(as[i], &x) || !absl::SimpleAtoi(bs[i], &y)) return false;
    if (x != y) return x < y;
  }
  return false;
}

void CompareCpuWords(const Traits& source, const Traits& target, ShapeComparison* result) {
  const std::string* here = Find(source, "cpu");
  const std::string* there = Find(target, "cpu");
  if (here == nullptr || there == nullptr || *here != *there) return;  // said already
  int differ = 0;
  const auto count = [&differ](const Traits& a, const Traits& b, bool both) {
    for (const auto& [key, value] : a) {
      if (!absl::StartsWith(key, "cpu word ")) continue;
      const std::string* other = Find(b, key);
      differ += other == nullptr || (both && *other != value);
    }
  };
  count(source, target, /*both=*/true);
  count(target, source, /*both=*/false);
  if (differ == 0) return;
  result->warnings.push_back(
      absl::StrCat("CPU features: ", differ,
                   " words of CPUID differ between the source's QEMU and the "
                   "target's, which QEMU does not check: use a CPU model that both hosts have"));
}

}  // namespace

void AppendDevices(std::string_view qtree, GuestShape* shape) {
  DeviceTree tree(shape);
  for (absl::string_view line :
       absl::StrSplit(absl::string_view(qtree.data(), qtree.size()), '\n')) {
    tree.Take(line);
  }
}

void AppendRamBlocks(std::string_view ramblock, GuestShape* shape) {
  for (absl::string_view line :
       absl::StrSplit(absl::string_view(ramblock.data(), ramblock.size()), '\n')) {
    // "  0000:00:02.0/vga.vram    4 KiB  0x0...4080000 0x0...1000000 0x0...1000000 ...": name, page
    // size, then offset, bytes used, bytes at most.
    const std::vector<std::string> words = absl::StrSplit(line, ' ', absl::SkipWhitespace());
    if (words.size() < 6 || !absl::StartsWith(words[3], "0x")) continue;
    const uint64_t used = std::strtoull(words[4].c_str(), nullptr, 16);
    const uint64_t most = std::strtoull(words[5].c_str(), nullptr, 16);
    shape->push_back({absl::StrCat("block ", words[0]),
                      used == most ? absl::StrCat(most) : absl::StrCat("up to ", most)});
  }
}

absl::StatusOr<GuestShape> DescribeShape(QmpClient& qmp, absl::Time deadline) {
  GuestShape shape;
  if (absl::Status s = AppendMachine(qmp, deadline, &shape); !s.ok()) return s;
  if (absl::Status s = AppendCpu(qmp, deadline, &shape); !s.ok()) return s;
  absl::StatusOr<std::string> blocks = AskPeople(qmp, "info ramblock", deadline);
  if (!blocks.ok()) return blocks.status();
  AppendRamBlocks(*blocks, &shape);
  absl::StatusOr<std::string> tree = AskPeople(qmp, "info qtree", deadline);
  if (!tree.ok()) return tree.status();
  AppendDevices(*tree, &shape);
  if (absl::Status s = AppendDisks(qmp, deadline, &shape); !s.ok()) return s;
  return shape;
}

ShapeComparison CompareShapes(const GuestShape& source, const GuestShape& target) {
  ShapeComparison result;
  if (source.empty() || target.empty()) return result;
  const Traits here = ToMap(source);
  const Traits there = ToMap(target);
  const std::string* qemu_here = Find(here, "qemu");
  const std::string* qemu_there = Find(there, "qemu");
  const bool same_qemu = qemu_here != nullptr && qemu_there != nullptr && *qemu_here == *qemu_there;
  const auto compare = [&](const std::string& key) {
    const Kind* kind = KindOf(key);
    const std::string* a = Find(here, key);
    const std::string* b = Find(there, key);
    if (kind == nullptr || (a != nullptr && b != nullptr && *a == *b)) return;
    const absl::string_view kinds = kind->key;
    // Versions of QEMU tell more or less of a machine, and build the parts that come with it in
    // their own way.
    const bool machines_own = kinds == "device " || kinds == "smp " || kinds == "memory ";
    if (machines_own && !same_qemu && (a == nullptr || b == nullptr || kinds == "device ")) return;
    // More than the source has QEMU takes; less it does not.
    const bool refused = kind->refused && a != nullptr;
    (refused ? result.differences : result.warnings).push_back(DiffText(*kind, key, a, b));
  };
  for (const auto& [key, value] : here) compare(key);
  for (const auto& [key, value] : there) {
    if (Find(here, key) == nullptr) compare(key);
  }
  CompareCpuWords(here, there, &result);
  if (qemu_here != nullptr && qemu_there != nullptr && IsOlder(*qemu_there, *qemu_here)) {
    result.warnings.push_back(
        absl::StrCat("QEMU: ", *qemu_here, " at the source, the older ", *qemu_there,
                     " on the target, which may refuse what the newer saves"));
  }
  return result;
}

}  // namespace presync
