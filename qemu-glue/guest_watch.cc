#include "qemu-glue/guest_watch.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "qemu-glue/guest_shape.h"
#include "qemu-glue/nested_virtualization.h"
#include "qemu-glue/qemu_guest_calls.h"
#include "qemu-glue/ram_file_users.h"
#include "transport/clock.h"

namespace presync {
namespace {

// What no list of devices shows (a block back end that was exchanged under its disk, a disk's size)
// is looked for this often, and so are other processes that map the RAM files.
constexpr absl::Duration kSeldom = absl::Minutes(1);

enum Question { kStatus, kJobs, kFirstList, kQuestions = kFirstList + 3 };

std::vector<QmpCommand> Questions() {
  return {{"query-status", nullptr},
          {"query-block-jobs", nullptr},
          {"qom-list", {{"path", "/machine/peripheral"}}},
          {"qom-list", {{"path", "/machine/peripheral-anon"}}},
          {"qom-list", {{"path", "/objects"}}}};
}

// A job holds on to its disks, which QEMU has to let go of when it has saved the guest; and it does
// not move with the guest.
absl::Status CheckJobs(const Json& jobs) {
  std::vector<std::string> running;
  for (const Json& job : jobs) {
    const std::string status = StringAt(job, "status");
    if (!job.is_object() || status == "concluded" || status == "null") continue;
    running.push_back(
        absl::StrCat("'", StringAt(job, "device"), "' (", StringAt(job, "type"), ")"));
  }
  if (running.empty()) return absl::OkStatus();
  return absl::FailedPreconditionError(absl::StrCat(
      running.size() == 1 ? "a block job runs: " : "block jobs run: ", absl::StrJoin(running, ", "),
      "; QEMU can't hand its disks over meanwhile. Wait for its end (query-block-jobs), or cancel "
      "it (block-job-cancel)"));
}

// The QOM paths of the devices that the answers list.
std::set<std::string> DevicesIn(const std::vector<Json>& answers) {
  constexpr const char* kFolders[] = {"/machine/peripheral/", "/machine/peripheral-anon/"};
  std::set<std::string> paths;
  for (size_t i = 0; i < std::size(kFolders); ++i) {
    for (const Json& device : answers[kFirstList + i]) {
      paths.insert(absl::StrCat(kFolders[i], StringAt(device, "name")));
    }
  }
  return paths;
}

std::string ListBackends(const std::vector<RamBackend>& backends) {
  return absl::StrJoin(backends, ", ", [](std::string* out, const RamBackend& backend) {
    absl::StrAppend(out, "'", backend.id, "' of ", backend.size_bytes >> 20, " MiB");
  });
}

}  // namespace

absl::Status CheckRunState(std::string_view run_state) {
  struct Known {
    std::string_view state;
    const char* text;
  };
  constexpr Known kKnown[] = {
      {"paused", "the guest is paused here; a launch would run it on the target: resume it first"},
      {"prelaunch", "the guest was not started yet: run it first (`cont`)"},
      {"shutdown",
       "the guest has shut down; there is nothing to launch: reset it (`system_reset`, `cont`), or "
       "end its QEMU"},
      {"guest-panicked",
       "the guest has panicked; a launch would only move a crashed guest: reset it "
       "(`system_reset`, `cont`), or end its QEMU"},
      {"internal-error",
       "QEMU has stopped the guest for an internal error: reset it (`system_reset`, `cont`), or "
       "end "
       "its QEMU; its log says why"},
      {"io-error",
       "QEMU has stopped the guest for a disk's error: mend the disk and resume the guest "
       "(`cont`)"},
      {"watchdog", "the guest's watchdog has stopped it: resume it (`cont`) or reset it first"},
      {"suspended", "the guest sleeps (suspended to RAM): wake it first (`system_wakeup`)"},
      {"postmigrate",
       "QEMU stands where a migration left the guest, which may run elsewhere: look where it runs, "
       "and never resume it here while it may; if it certainly runs nowhere, `cont` by hand"},
  };
  if (run_state == "running") return absl::OkStatus();
  for (const Known& known : kKnown) {
    if (run_state == known.state) return absl::FailedPreconditionError(known.text);
  }
  return absl::FailedPreconditionError(
      absl::StrCat("the guest does not run here, QEMU says '", std::string(run_state),
                   "'; a launch would run it on the target: resume it first"));
}

GuestOutlook GuestWatch::Look(QmpClient& qmp, absl::Time deadline) {
  const absl::StatusOr<std::vector<Json>> answers = qmp.ExecuteAll(Questions(), deadline);
  if (!answers.ok()) return Unknown(answers.status());
  std::string lists;
  for (int i = kFirstList; i < kQuestions; ++i)
    absl::StrAppend(&lists, ToText((*answers)[i]), "\n");
  const bool came_and_went = CameAndWent(qmp);  // each event counts at one look
  const bool written_unseen_before = written_unseen_ || came_and_went;
  const bool disks_changed = LookAtDisks(qmp, deadline);
  if (!looked_ || lists != lists_ || disks_changed) {
    if (absl::Status s = LookCloser(qmp, deadline); !s.ok()) {
      disks_.clear();  // so that it is tried again
      return Unknown(s);
    }
    lists_ = lists;
    looked_ = true;
    devices_ = DevicesIn(*answers);
  }
  LookForOthers();
  if (may_nest_ && !ever_nested_) ever_nested_ = RunsHypervisor(qmp, deadline);

  GuestOutlook outlook = known_;
  outlook.was_written_unseen = written_unseen_before && !written_unseen_;
  outlook.compare_all = ever_nested_;
  if (ever_nested_) outlook.warnings.push_back(kNestedSeen);
  outlook.warnings.insert(outlook.warnings.end(), others_.begin(), others_.end());
  absl::StatusOr<std::string> run_state = RunStateOf(qmp, (*answers)[kStatus]);
  const absl::Status runs = run_state.ok() ? CheckRunState(*run_state) : run_state.status();
  outlook.launchable = outlook.mirrorable.ok() ? runs : outlook.mirrorable;
  if (outlook.launchable.ok()) outlook.launchable = CheckJobs((*answers)[kJobs]);
  return outlook;
}

GuestOutlook GuestWatch::Unknown(absl::Status why) const {
  GuestOutlook outlook = known_;
  outlook.compare_all = ever_nested_;
  outlook.launchable = std::move(why);
  return outlook;
}

// Whether a device was there between the last look and this one, and at neither of them.
bool GuestWatch::CameAndWent(QmpClient& qmp) {
  std::set<std::string> known = devices_;
  bool unknown = false;
  for (const QmpEvent& event : qmp.TakeEvents("DEVICE_DELETED")) {
    const std::string path = StringAt(event.data, "path");
    // Its parts are told of as well, and before the first look a device was none of ours.
    if (std::count(path.begin(), path.end(), '/') == 3) unknown |= known.erase(path) == 0;
  }
  return unknown && looked_;
}

// Whether the block nodes are others than at the last look; looks from time to time only.
bool GuestWatch::LookAtDisks(QmpClient& qmp, absl::Time deadline) {
  if (MonotonicNow() < next_disks_) return false;
  next_disks_ = MonotonicNow() + kSeldom;
  const absl::StatusOr<Json> nodes =
      qmp.Execute("query-named-block-nodes", {{"flat", true}}, deadline);
  if (!nodes.ok()) return false;
  std::string disks;
  for (const Json& node : *nodes) {
    const Json* image = FindMember(node, "image");
    const uint64_t bytes = image == nullptr ? 0 : UintAt(*image, "virtual-size").value_or(0);
    absl::StrAppend(&disks, StringAt(node, "node-name"), " ", StringAt(node, "drv"), " ", bytes,
                    "\n");
  }
  return std::exchange(disks_, disks) != disks;
}

absl::Status GuestWatch::LookCloser(QmpClient& qmp, absl::Time deadline) {
  absl::StatusOr<GuestInfo> info = DescribeGuest(qmp, deadline);
  if (!info.ok()) return info.status();
  absl::StatusOr<Findings> findings = CheckTrackable(qmp, *info, deadline);
  if (!findings.ok()) return findings.status();
  if (!looked_) mirrored_ = info->backends;
  known_ = {.shape = std::move(known_.shape)};
  TakeFindings(*findings);
  if (absl::Status s = CheckMirrored(*info); !s.ok()) {
    known_.mirrorable = absl::FailedPreconditionError(absl::StrCat(
        known_.mirrorable.message(), known_.mirrorable.ok() ? "" : "; and ", s.message()));
  }
  may_nest_ = findings->may_nest;
  // Without it the target compares with what it was told before, or not at all.
  if (absl::StatusOr<GuestShape> shape = DescribeShape(qmp, deadline); shape.ok()) {
    known_.shape = *std::move(shape);
  }
  return absl::OkStatus();
}

void GuestWatch::TakeFindings(const Findings& findings) {
  std::vector<std::string> texts;
  written_unseen_ = false;
  for (const Problem& problem : findings.problems) {
    texts.push_back(absl::StrCat(problem.what, " -> ", problem.remedy));
    written_unseen_ |= problem.writes_unseen;
  }
  known_.warnings = findings.warnings;
  if (texts.empty()) return;
  known_.mirrorable = absl::FailedPreconditionError(
      absl::StrCat("the guest can't be launched as it is now: ", absl::StrJoin(texts, "; "),
                   written_unseen_ ? ". The copy may be wrong as long as that is there; afterwards "
                                     "all of it is compared again"
                                   : ""));
}

// Memory that came or went since the sync began is not in the copy.
absl::Status GuestWatch::CheckMirrored(const GuestInfo& info) {
  const bool same =
      std::equal(info.backends.begin(), info.backends.end(), mirrored_.begin(), mirrored_.end(),
                 [](const RamBackend& a, const RamBackend& b) {
                   return a.id == b.id && a.size_bytes == b.size_bytes && a.path == b.path;
                 });
  if (same) return absl::OkStatus();
  return absl::FailedPreconditionError(absl::StrCat(
      "the guest's memory is not what it was when the sync began: then ", ListBackends(mirrored_),
      ", now ", ListBackends(info.backends),
      ". Give the target's QEMU the same memory, then presync stop and presync start: the sync "
      "begins anew with it"));
}

// Takes what the last search found, and begins the next one when it is due.
void GuestWatch::LookForOthers() {
  if (search_.valid() && search_.wait_for(std::chrono::seconds(0)) == std::future_status::ready) {
    others_ = search_.get();
  }
  if (search_.valid() || MonotonicNow() < next_search_) return;
  next_search_ = MonotonicNow() + kSeldom;
  std::vector<std::string> paths;
  for (const RamBackend& backend : mirrored_) paths.push_back(backend.path);
  search_ = std::async(std::launch::async,
                       [paths, qemu = qemu_] { return FindRamFileUsers(paths, qemu); });
}

GuestOutlook LookThrough(std::unique_ptr<QmpClient>* qmp, const PeerProcess& process,
                         GuestWatch* watch, absl::Time deadline) {
  if (absl::Status s = ReviveMonitor(qmp, process, deadline); !s.ok()) return watch->Unknown(s);
  GuestOutlook outlook = watch->Look(**qmp, deadline);
  if ((*qmp)->health().ok()) return outlook;
  // It was closed in the middle of it, or QEMU has ended.
  if (absl::Status s = ReviveMonitor(qmp, process, deadline); !s.ok()) return watch->Unknown(s);
  outlook = watch->Look(**qmp, deadline);
  if (absl::IsUnavailable(outlook.launchable) && !process.HasEnded()) {
    outlook.launchable = absl::AbortedError(
        absl::StrCat("QEMU's monitor closed twice: ", outlook.launchable.message()));
  }
  return outlook;
}

}  // namespace presync
