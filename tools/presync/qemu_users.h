// Whether the QEMUs that presyncd starts are kept apart, from it and from each other.
#pragma once

#include <nlohmann/json.hpp>
#include <vector>

#include "tools/presync/doctor.h"

namespace presync {

// `qemu`: what presyncd says of it in a status. Nothing of one that says nothing.
std::vector<Finding> JudgeQemuUsers(const nlohmann::json& qemu);

}  // namespace presync
