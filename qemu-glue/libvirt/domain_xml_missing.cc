// Without libvirt there is no domain to look at.
#include "absl/strings/str_cat.h"
#include "qemu-glue/libvirt/domain_xml.h"

namespace presync {
namespace {

absl::Status Missing() {
  return absl::UnimplementedError("this presync was built without libvirt");
}

}  // namespace

DomainSockets SocketsOf(const std::string& folder, const std::string& uuid) {
  const std::string base = absl::StrCat(folder, "/", uuid);
  return {.qmp = base + ".qmp", .glue = base + ".glue", .stream = base + ".stream"};
}
absl::StatusOr<DomainNames> NamesIn(const std::string&) { return Missing(); }
absl::StatusOr<std::vector<Problem>> CheckDomain(const std::string&, const DomainSockets&) {
  return Missing();
}
absl::StatusOr<std::string> AddPresync(const std::string&, const DomainSockets&,
                                       const std::string&) {
  return Missing();
}
std::string PresyncElements(const DomainSockets&, const std::string&) { return ""; }

}  // namespace presync
