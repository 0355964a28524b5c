// Small files that have to outlive a crash of this host.
#pragma once

#include <string>

#include "absl/status/status.h"
#include "absl/strings/string_view.h"

namespace presync {

// Puts `bytes` into `path` (mode 0600), so that after a crash it has either all of them or what it
// had before: they are written beside it, at `next`, in the same folder. SyncFolder makes sure that
// it has them. `what` begins the text of an error ("note of a sync"). UNAVAILABLE: a step failed;
// nothing is left at `next`.
absl::Status ReplaceWhole(absl::string_view what, const std::string& path, const std::string& next,
                          absl::string_view bytes);

// Makes durable which files `folder` has. UNAVAILABLE.
absl::Status SyncFolder(absl::string_view what, const std::string& folder);

}  // namespace presync
