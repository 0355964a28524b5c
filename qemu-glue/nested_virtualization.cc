#include "qemu-glue/nested_virtualization.h"

#include <cstdint>
#include <cstdlib>
#include <string>

namespace presync {
namespace {

constexpr uint64_t kCr4Vmxe = uint64_t{1} << 13;
constexpr uint64_t kEferSvme = uint64_t{1} << 12;

// Whether any "NAME=hex" of `text` has the bit.
bool HasBit(const std::string& text, const std::string& name, uint64_t bit) {
  for (size_t at = text.find(name); at != std::string::npos; at = text.find(name, at + 1)) {
    if ((std::strtoull(text.c_str() + at + name.size(), nullptr, 16) & bit) != 0) return true;
  }
  return false;
}

}  // namespace

bool MayNest(QmpClient& qmp, absl::Time deadline) {
  const absl::StatusOr<Json> cpus = qmp.Execute("query-cpus-fast", nullptr, deadline);
  if (!cpus.ok() || !cpus->is_array() || cpus->empty()) return false;
  const std::string path = StringAt((*cpus)[0], "qom-path");
  for (const char* feature : {"vmx", "svm"}) {
    const absl::StatusOr<Json> has =
        qmp.Execute("qom-get", {{"path", path}, {"property", feature}}, deadline);
    if (has.ok() && has->is_boolean() && *has->get_ptr<const bool*>()) return true;
  }
  return false;
}

bool RunsHypervisor(QmpClient& qmp, absl::Time deadline) {
  const absl::StatusOr<Json> text =
      qmp.Execute("human-monitor-command", {{"command-line", "info registers -a"}}, deadline);
  if (!text.ok() || !text->is_string()) return false;
  const std::string& registers = *text->get_ptr<const std::string*>();
  return HasBit(registers, "CR4=", kCr4Vmxe) || HasBit(registers, "EFER=", kEferSvme);
}

}  // namespace presync
