// Guests that may be hosts themselves.
//
// While an inner guest runs under KVM, the processor and KVM write some pages of the inner
// hypervisor by their frame (its VMCS or VMCB, the virtual-APIC page, posted-interrupt
// descriptors: Linux, arch/x86/kvm/vmx/nested.c), past the page tables that a dirty log watches.
#pragma once

#include "absl/time/time.h"
#include "qemu-glue/qmp/qmp_client.h"

namespace presync {

inline constexpr char kNestedPossible[] =
    "the guest's CPU offers virtualization (vmx or svm): if it runs guests of its own, KVM writes "
    "some of its pages unseen. presync compares all memory at the launch once it has seen an inner "
    "hypervisor at work, at looks some seconds apart: launch with --verify if there may be others, "
    "or take the feature away (-cpu ...,-vmx,-svm)";
inline constexpr char kNestedSeen[] =
    "the guest runs, or has run, a hypervisor of its own: each launch compares all memory before "
    "the guest may run on the target, as with --verify";

// Whether the guest sees vmx or svm on its first CPU; false too if QEMU can't tell. Matters under
// KVM only: QEMU's own emulation writes through its page tables.
bool MayNest(QmpClient& qmp, absl::Time deadline);

// Whether a vCPU has virtualization switched on just now (CR4.VMXE, EFER.SVME: Intel's and AMD's
// manuals).
bool RunsHypervisor(QmpClient& qmp, absl::Time deadline);

}  // namespace presync
