// What a QEMU's guest is made of, and whether another QEMU could take it over: asked before a
// launch finds out the hard way, with the guest stopped.
#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "qemu-glue/qmp/qmp_client.h"
#include "transport/guest.h"
#include "transport/sync/target_host.h"

namespace presync {

// Asks a QEMU, running or waiting, with some ten questions. Keys:
//   machine, qemu, accel           "pc-q35-7.2-machine", "7.2.22", "kvm"
//   cpu, cpu word EAX/ECX/REG      "qemu64-x86_64-cpu"; the words of CPUID that are not zero
//   smp NAME, memory NAME          of the machine's properties of these names
//   block NAME                     its bytes: RAM blocks that are not memory backends (video RAM,
//                                  ROMs); "up to N" where QEMU takes a shorter one
//   pci BUS/SLOT                   the type of the device there
//   device BUS TYPE                how many there are, of those that are not PCI
//   disk DEVICE                    bytes
// What this QEMU can't tell is left out. Errors as QmpClient::Execute, but no refusal is one.
absl::StatusOr<GuestShape> DescribeShape(QmpClient& qmp, absl::Time deadline);

// What stands between a guest of shape `source` and a QEMU of shape `target`. A trait of which only
// one side knows the kind says nothing.
ShapeComparison CompareShapes(const GuestShape& source, const GuestShape& target);

// The parts that read what QEMU prints for people (`info qtree`, `info ramblock`): lines of another
// form are passed over.
void AppendDevices(std::string_view qtree, GuestShape* shape);
void AppendRamBlocks(std::string_view ramblock, GuestShape* shape);

}  // namespace presync
