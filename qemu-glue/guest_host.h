// All that this host offers to guests that come: QEMUs of its own configuration, and libvirt's
// domains.
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "qemu-glue/libvirt/libvirt_target_host.h"
#include "qemu-glue/qemu_target_host.h"
#include "transport/sync/target_host.h"

namespace presync {

// Thread-safe.
class GuestHost final : public TargetHost {
 public:
  // `libvirt` is null on a host that takes none of its guests.
  GuestHost(std::unique_ptr<QemuTargetHost> qemu, std::unique_ptr<LibvirtTargetHost> libvirt)
      : qemu_(std::move(qemu)), libvirt_(std::move(libvirt)) {}

  absl::StatusOr<std::unique_ptr<TargetPlace>> MakePlace(
      const std::string& guest, const std::vector<RegionRequest>& regions) override {
    return qemu_->MakePlace(guest, regions);
  }
  absl::StatusOr<std::unique_ptr<TargetPlace>> MakeDomainPlace(
      const std::string& guest, const std::string& domain,
      const std::vector<RegionRequest>& regions) override {
    if (libvirt_ == nullptr) return TargetHost::MakeDomainPlace(guest, domain, regions);
    return libvirt_->MakePlace(guest, domain, regions);
  }

  // Mirrors of libvirt's guests do not outlive presyncd.
  std::vector<KeptPlace> TakeKept(
      const std::function<bool(const CopyOwner&)>& may_be_used) override {
    return qemu_->TakeKept(may_be_used);
  }

  absl::Status EndOrphan(const HandoverEntry& entry) override {
    if (!LibvirtTargetHost::IsAddress(entry.detail)) return qemu_->EndOrphan(entry);
    return libvirt_ == nullptr ? NoLibvirt(entry.detail) : libvirt_->EndOrphan(entry.detail);
  }
  // See RecoveryHost.
  absl::Status RunOrphan(const HandoverEntry& entry) {
    if (!LibvirtTargetHost::IsAddress(entry.detail)) return qemu_->RunOrphan(entry);
    return libvirt_ == nullptr ? NoLibvirt(entry.detail) : libvirt_->RunOrphan(entry.detail);
  }

  QemuTargetHost* qemu() { return qemu_.get(); }
  LibvirtTargetHost* libvirt() { return libvirt_.get(); }

 private:
  static absl::Status NoLibvirt(const std::string& address) {
    return absl::UnavailableError(absl::StrCat(
        address, " can't be looked at: presyncd.toml has no [libvirt] any more; put it back"));
  }

  const std::unique_ptr<QemuTargetHost> qemu_;
  const std::unique_ptr<LibvirtTargetHost> libvirt_;
};

}  // namespace presync
