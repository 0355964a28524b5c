#include "qemu-glue/qemu_guest_settings.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"

namespace presync {
namespace {

// QEMU's defaults (migration/options.c; 7.2 to 10.0 agree).
const Json& QemuDefaults() {
  static const Json* const defaults =
      new Json{{"max-bandwidth", uint64_t{128} << 20}, {"downtime-limit", uint64_t{300}}};
  return *defaults;
}

struct CapabilityChange {
  Json wanted = Json::array();
  Json old = Json::array();
};

absl::StatusOr<CapabilityChange> PlanCapabilities(const Json& current,
                                                  const std::vector<std::string>& on) {
  CapabilityChange change;
  size_t known = 0;
  for (const Json& entry : current) {
    const std::string name = StringAt(entry, "capability");
    const bool is_on = BoolAt(entry, "state").value_or(false);
    const bool want_on = std::find(on.begin(), on.end(), name) != on.end();
    known += want_on ? 1 : 0;
    if (is_on != want_on) change.wanted.push_back({{"capability", name}, {"state", want_on}});
    // See QemuSourceGuest: x-ignore-shared is left off, whoever left it on.
    if (name == "x-ignore-shared") {
      change.old.push_back({{"capability", name}, {"state", false}});
    } else if (is_on != want_on) {
      change.old.push_back({{"capability", name}, {"state", is_on}});
    }
  }
  if (known == on.size()) return change;
  std::string names;
  for (const std::string& name : on) absl::StrAppend(&names, " ", name);
  return absl::FailedPreconditionError(absl::StrCat(
      "this QEMU lacks one of the migration capabilities", names, "; use QEMU 4.0 or later"));
}

}  // namespace

absl::StatusOr<MigrationSettings> MigrationSettings::Apply(QmpClient& qmp,
                                                           const std::vector<std::string>& on,
                                                           const Json& parameters,
                                                           absl::Time deadline) {
  const absl::StatusOr<std::vector<Json>> answers = qmp.ExecuteAll(Questions(), deadline);
  if (!answers.ok()) return answers.status();
  absl::StatusOr<MigrationSettings> settings = Plan(*answers, on, parameters);
  if (!settings.ok()) return settings.status();
  if (absl::Status s = settings->Set(qmp, deadline); !s.ok()) return s;
  return settings;
}

std::vector<QmpCommand> MigrationSettings::Questions() {
  return {{"query-migrate-capabilities", nullptr}, {"query-migrate-parameters", nullptr}};
}

absl::StatusOr<MigrationSettings> MigrationSettings::Plan(absl::Span<const Json> answers,
                                                          const std::vector<std::string>& on,
                                                          const Json& parameters) {
  absl::StatusOr<CapabilityChange> change = PlanCapabilities(answers[0], on);
  if (!change.ok()) return change.status();
  const Json& current = answers[1];
  MigrationSettings settings;
  settings.wanted_capabilities_ = {{"capabilities", std::move(change->wanted)}};
  settings.old_capabilities_ = {{"capabilities", std::move(change->old)}};
  settings.wanted_parameters_ = settings.old_parameters_ = Json::object();
  for (const auto& [name, value] : parameters.items()) {
    const Json* old = FindMember(current, name.c_str());
    if (old == nullptr || *old == value) continue;
    settings.wanted_parameters_[name] = value;
    settings.old_parameters_[name] = *old;
  }
  if (const std::string tls = StringAt(current, "tls-creds"); !tls.empty()) {
    settings.wanted_parameters_["tls-creds"] = "";
    settings.old_parameters_["tls-creds"] = tls;
  }
  return settings;
}

// The capabilities first, and their answer is awaited: while a migration of somebody else's runs
// QEMU refuses these, but would take parameters.
absl::Status MigrationSettings::Set(QmpClient& qmp, absl::Time deadline) const {
  absl::Status done =
      qmp.Execute("migrate-set-capabilities", wanted_capabilities_, deadline).status();
  if (!done.ok()) return done;
  done = qmp.Execute("migrate-set-parameters", wanted_parameters_, deadline).status();
  if (!done.ok()) {
    (void)qmp.Execute("migrate-set-capabilities", old_capabilities_, deadline);
  }
  return done;
}

absl::StatusOr<std::optional<MigrationSettings>> MigrationSettings::FindAbandoned(
    QmpClient& qmp, const Json& parameters, absl::Time deadline) {
  absl::StatusOr<Json> capabilities = qmp.Execute("query-migrate-capabilities", nullptr, deadline);
  if (!capabilities.ok()) return capabilities.status();
  const bool left_on =
      std::any_of(capabilities->begin(), capabilities->end(), [](const Json& entry) {
        return StringAt(entry, "capability") == "x-ignore-shared" &&
               BoolAt(entry, "state").value_or(false);
      });
  if (!left_on) return std::nullopt;
  absl::StatusOr<Json> current = qmp.Execute("query-migrate-parameters", nullptr, deadline);
  if (!current.ok()) return current.status();
  MigrationSettings settings;
  settings.old_capabilities_ = {{"capabilities",
                                 {{{"capability", "x-ignore-shared"}, {"state", false}},
                                  {{"capability", "pause-before-switchover"}, {"state", false}}}}};
  settings.old_parameters_ = Json::object();
  for (const auto& [name, value] : QemuDefaults().items()) {
    const Json* ours = FindMember(parameters, name.c_str());
    const Json* now = FindMember(*current, name.c_str());
    if (ours != nullptr && now != nullptr && *ours == *now) settings.old_parameters_[name] = value;
  }
  return settings;
}

absl::Status MigrationSettings::Restore(QmpClient& qmp, absl::Time deadline) const {
  absl::Status capabilities =
      qmp.Execute("migrate-set-capabilities", old_capabilities_, deadline).status();
  absl::Status parameters =
      qmp.Execute("migrate-set-parameters", old_parameters_, deadline).status();
  return capabilities.ok() ? parameters : capabilities;
}

absl::Status MigrationSettings::PostRestore(QmpClient& qmp, absl::Time deadline) const {
  absl::Status status = qmp.Post("migrate-set-capabilities", old_capabilities_, deadline);
  if (status.ok()) status = qmp.Post("migrate-set-parameters", old_parameters_, deadline);
  return status;
}

}  // namespace presync
