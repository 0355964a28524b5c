// Who listens at a monitor's socket, asked without talking to it.
#pragma once

#include <string>

namespace presync {

// Whether somebody listens there whose process lives. In doubt it does.
bool ListenerLives(const std::string& path);

}  // namespace presync
