// Without libvirt there is no domain to look at.
#include "qemu-glue/libvirt/domain_xml.h"

namespace presync {
namespace {

absl::Status Missing() {
  return absl::UnimplementedError("this presync was built without libvirt");
}

}  // namespace

DomainSockets SocketsOf(const std::string&, const std::string&) { return {}; }
DomainSockets OldSocketsOf(const std::string&, const std::string&) { return {}; }
DomainSockets SocketsIn(const std::string&, const std::string&, const std::string&) { return {}; }
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
