// A presync that was built without libvirt says so.
#include "qemu-glue/libvirt/libvirt_client.h"

namespace presync {
namespace {

absl::Status Missing() {
  return absl::UnimplementedError(
      "this presync was built without libvirt: install libvirt-dev and libpugixml-dev and build it "
      "again");
}

}  // namespace

absl::StatusOr<std::string> LibvirtClient::Version() const { return Missing(); }
absl::StatusOr<QmpVersion> LibvirtClient::Qemu() const { return Missing(); }
absl::StatusOr<DomainInfo> LibvirtClient::Find(const std::string&) const { return Missing(); }
absl::Status LibvirtClient::Define(const std::string&) const { return Missing(); }
absl::StatusOr<bool> LibvirtClient::StartsByItself(const std::string&) const { return Missing(); }
absl::StatusOr<DomainState> LibvirtClient::State(const std::string&) const { return Missing(); }
absl::StatusOr<DomainJob> LibvirtClient::Job(const std::string&) const { return Missing(); }
absl::Status LibvirtClient::Move(const std::string&, const DomainMove&) const { return Missing(); }
absl::Status LibvirtClient::AbortJob(const std::string&) const { return Missing(); }
absl::Status LibvirtClient::Resume(const std::string&) const { return Missing(); }
absl::Status LibvirtClient::Destroy(const std::string&) const { return Missing(); }

}  // namespace presync
