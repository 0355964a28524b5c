// QEMU's migration settings, borrowed for one save or load and given back.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "qemu-glue/qmp/qmp_client.h"

namespace presync {

// Remembers what QEMU had. A value; it holds no connection.
class MigrationSettings {
 public:
  // Turns on exactly the capabilities `on`, all others off (multifd, return-path and their like
  // change the stream or need a channel back), sets `parameters` (an object) where this QEMU knows
  // them, and takes TLS off, since the stream is local. Nothing is changed on error, except when
  // the connection breaks between. FAILED_PRECONDITION: this QEMU lacks one of `on`, or refuses;
  // else as QmpClient::Execute.
  static absl::StatusOr<MigrationSettings> Apply(QmpClient& qmp, const std::vector<std::string>& on,
                                                 const Json& parameters, absl::Time deadline);

  // What Restore needs where the one who applied `parameters` is gone and with it what QEMU had:
  // QEMU's defaults for those that still stand, and x-ignore-shared and pause-before-switchover
  // off. nullopt: nothing of it is left (x-ignore-shared is off). Changes nothing.
  static absl::StatusOr<std::optional<MigrationSettings>> FindAbandoned(QmpClient& qmp,
                                                                        const Json& parameters,
                                                                        absl::Time deadline);

  // Puts everything back, x-ignore-shared always off. Only while no migration is under way.
  absl::Status Restore(QmpClient& qmp, absl::Time deadline) const;
  // The same without waiting for QEMU's answers.
  absl::Status PostRestore(QmpClient& qmp, absl::Time deadline) const;

 private:
  Json old_capabilities_;  // arguments of migrate-set-capabilities
  Json old_parameters_;    // arguments of migrate-set-parameters
};

}  // namespace presync
