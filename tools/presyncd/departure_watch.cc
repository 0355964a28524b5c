#include "tools/presyncd/departure_watch.h"

#include <algorithm>
#include <memory>

#include "absl/strings/str_cat.h"
#include "qemu-glue/process_identity.h"
#include "qemu-glue/qemu_guest_calls.h"
#include "qemu-glue/qmp/listener.h"
#include "qemu-glue/qmp/peer_process.h"
#include "qemu-glue/qmp/qmp_client.h"
#include "transport/clock.h"
#include "transport/sync/departures.h"

namespace presync {
namespace {

constexpr absl::Duration kTimeout = absl::Seconds(3);

// A QEMU that was started to take a guest gets it from where it runs.
bool WaitsForAGuest(const PeerProcess& process) {
  const absl::StatusOr<std::vector<std::string>> arguments = process.CommandLine();
  return arguments.ok() &&
         std::any_of(arguments->begin(), arguments->end(), [](const std::string& argument) {
           return argument == "-incoming" || argument == "--incoming";
         });
}

}  // namespace

// Ok: nobody is there, or it is in order. FAILED_PRECONDITION: somebody started it again.
absl::Status DepartureWatch::LookAt(const HandoverEntry& departure) {
  const std::string& path = departure.detail;
  if (path.empty() || path[0] != '/' || !ListenerLives(path)) return absl::OkStatus();
  const absl::Time deadline = MonotonicNow() + kTimeout;
  // A monitor that does not answer may be about to close: what can't be asked is asked again.
  absl::StatusOr<std::unique_ptr<QmpClient>> qmp = QmpClient::Connect(path, deadline);
  if (!qmp.ok()) return absl::OkStatus();
  const absl::StatusOr<PeerProcess> process = PeerProcess::Identify(**qmp, deadline);
  if (!process.ok()) return absl::OkStatus();
  // The one that it left from is recovery's to end.
  if (FormatProcess(IdentityOf(*process)) == departure.process) return absl::OkStatus();
  const absl::StatusOr<std::string> run_state = QueryRunState(**qmp, deadline);
  if (!run_state.ok()) return absl::OkStatus();
  if (WaitsForAGuest(*process)) {
    return *run_state == "running" ? ForgetDeparture(folder_, departure.guest) : absl::OkStatus();
  }
  std::string held = absl::StrCat("it is '", *run_state, "'");
  if (*run_state == "running") {
    const absl::Status stopped = (*qmp)->Execute("stop", nullptr, deadline).status();
    held = stopped.ok() ? "it was stopped, and is held still"
                        : absl::StrCat("it RUNS, and could not be stopped: ", stopped.message());
  }
  return absl::FailedPreconditionError(
      absl::StrCat("the guest moved to ", departure.peer, ", and somebody started a QEMU at ", path,
                   " again (process ", process->pid(), "): ", held));
}

void DepartureWatch::Look(const Recovery::InUse& in_use) {
  std::vector<std::string> unreadable;
  std::vector<OpenMatter> open;
  for (const HandoverEntry& departure : ReadDepartures(folder_, &unreadable)) {
    if (in_use(departure.guest)) continue;
    const absl::Status looked = LookAt(departure);
    if (looked.ok()) continue;
    OpenMatter matter = {
        .entry = departure,
        .path = DeparturePath(folder_, departure),
        .known = std::string(looked.message()),
        .advice = absl::StrCat(
            "end it, and have whoever started it ask first (presync may-start ", departure.guest,
            "). If the guest certainly runs nowhere else, or this is another one: "
            "presync may-start ",
            departure.guest, " --clear, and resume it"),
        .for_a_person = true};
    open.push_back(std::move(matter));
  }
  MutexLock lock(&mutex_);
  for (const OpenMatter& matter : open) {
    const bool known = std::any_of(open_.begin(), open_.end(), [&](const OpenMatter& before) {
      return before.entry.guest == matter.entry.guest;
    });
    const bool ran = matter.known.find("held still") != std::string::npos;
    if (!known || ran) log_(true, MatterText(matter));
  }
  open_ = std::move(open);
}

std::vector<OpenMatter> DepartureWatch::open() const {
  MutexLock lock(&mutex_);
  return open_;
}

}  // namespace presync
