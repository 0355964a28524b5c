// QEMU's migration settings, borrowed for one save or load and given back.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "absl/types/span.h"
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

  // Apply in pieces, for who has more to ask at the same time: what to ask, what follows from the
  // answers (in that order), and the change itself.
  static std::vector<QmpCommand> Questions();
  static absl::StatusOr<MigrationSettings> Plan(absl::Span<const Json> answers,
                                                const std::vector<std::string>& on,
                                                const Json& parameters);
  absl::Status Set(QmpClient& qmp, absl::Time deadline) const;

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
  // Arguments of migrate-set-capabilities and migrate-set-parameters.
  Json wanted_capabilities_, old_capabilities_;
  Json wanted_parameters_, old_parameters_;
};

}  // namespace presync
