// The part of discovery that looks for devices whose writes to guest RAM nobody would see.
#pragma once

#include <string>

#include "absl/status/status.h"
#include "absl/time/time.h"
#include "absl/types/span.h"
#include "qemu-glue/discovery.h"
#include "qemu-glue/qmp/qmp_client.h"

namespace presync {

// The X of a QOM property's type "child<X>"; empty if it is no child.
std::string ChildType(const Json& property);

// Walks the device tree, the objects and the network back ends. Adds what it finds. Errors as
// QmpClient::Execute.
absl::Status CheckDevices(QmpClient& qmp, absl::Time deadline, Findings& findings);

// Whether a QEMU with these arguments (argv[0] included) was started with -S.
bool HasStoppedOption(absl::Span<const std::string> arguments);

}  // namespace presync
