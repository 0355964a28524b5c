// A `start` request of the local socket, over what the configuration says, as a session's options.
#pragma once

#include <nlohmann/json.hpp>
#include <string>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "tools/presyncd/config.h"
#include "transport/sync/source_session.h"

namespace presync {

// INVALID_ARGUMENT: "none", "lz4", "zstd" and "auto" are all there are.
absl::StatusOr<Compression> ToCompression(const std::string& name);

// FAILED_PRECONDITION: a launch to `peer` can't be as short as these options promise, with what can
// be promised. For whoever asks for it now: a sync that goes on keeps what it was told.
absl::Status CheckPromise(const SourceSyncOptions& options, const std::string& peer);

// But for the guest: who calls knows it. `fixed_cost`: of launches to the target, as known so far.
// INVALID_ARGUMENT: a value that makes no sense. FAILED_PRECONDITION: what is asked for can't be
// had, with what can.
absl::StatusOr<SourceSessionOptions> ReadSessionOptions(const nlohmann::json& request,
                                                        const Config& config,
                                                        absl::Duration fixed_cost);

}  // namespace presync
