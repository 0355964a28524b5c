// Watches what a launch of a QEMU guest depends on apart from its memory: whether it runs, which
// devices it has, what else writes its memory.
#pragma once

#include <sys/types.h>

#include <future>
#include <memory>
#include <set>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "absl/time/time.h"
#include "qemu-glue/discovery.h"
#include "qemu-glue/qmp/peer_process.h"
#include "qemu-glue/qmp/qmp_client.h"
#include "transport/guest.h"

namespace presync {

// Whether a guest in this state of QEMU's can be launched. FAILED_PRECONDITION: not yet, with what
// to do.
absl::Status CheckRunState(std::string_view run_state);

// Of one guest, from the moment its sync begins. One thread at a time, the one that uses the
// monitor.
class GuestWatch {
 public:
  // `qemu`: its process, which maps its own RAM.
  explicit GuestWatch(pid_t qemu) : qemu_(qemu) {}
  GuestWatch(GuestWatch&&) = default;
  GuestWatch& operator=(GuestWatch&&) = default;

  // See SourceGuest::Look. The first look takes the guest's memory back ends for what is mirrored.
  // QEMU tells nobody that a device was added, so its lists of devices and objects are compared
  // with those of the look before, and where they differ everything is looked at anew. It does tell
  // that a device went: of one that came and went between two looks nothing is known, so it counts
  // as one that wrote unseen.
  GuestOutlook Look(QmpClient& qmp, absl::Time deadline);

  // What is to be said where it can't be looked at: what was known, and why a launch is not
  // possible.
  GuestOutlook Unknown(absl::Status why) const;

 private:
  bool CameAndWent(QmpClient& qmp);
  bool LookAtDisks(QmpClient& qmp, absl::Time deadline);
  absl::Status LookCloser(QmpClient& qmp, absl::Time deadline);
  void TakeFindings(const Findings& findings);
  absl::Status CheckMirrored(const GuestInfo& info);
  void LookForOthers();

  pid_t qemu_;
  bool looked_ = false;
  std::string lists_;              // of devices and objects, as they were at the last look
  std::set<std::string> devices_;  // the QOM paths of the devices among them
  GuestOutlook known_;             // since the last closer look; whether it runs is not in it
  std::vector<RamBackend> mirrored_;
  bool written_unseen_ = false;  // now
  bool ever_nested_ = false;     // an inner hypervisor was seen
  bool may_nest_ = false;
  std::string disks_;  // block nodes and their sizes, as they were at the last look
  absl::Time next_disks_ = absl::InfinitePast();
  // Who else maps the RAM files: reading all of /proc takes its time, so a thread does.
  std::future<std::vector<std::string>> search_;
  std::vector<std::string> others_;
  absl::Time next_search_ = absl::InfinitePast();
};

// A look through a monitor that is connected to anew where its connection was lost.
GuestOutlook LookThrough(std::unique_ptr<QmpClient>* qmp, const PeerProcess& process,
                         GuestWatch* watch, absl::Time deadline);

}  // namespace presync
