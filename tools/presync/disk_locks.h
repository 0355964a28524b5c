// The last line against two guests on the same disks: QEMU's own locks, where they reach the other
// host.
#pragma once

#include <string>
#include <vector>

#include "absl/time/time.h"
#include "qemu-glue/qmp/qmp_client.h"
#include "tools/presync/doctor.h"

namespace presync {

// Of the answer to query-named-block-nodes: what is written to, and what keeps a second QEMU on
// another host from writing to it, too.
std::vector<Finding> JudgeDisks(const Json& nodes);

std::vector<Finding> ExamineDisks(QmpClient& qmp, absl::Time deadline);

}  // namespace presync
