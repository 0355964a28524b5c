// What QEMU's accounts of its block devices tell of reads that write guest memory without a fault.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "qemu-glue/qmp/json_read.h"
#include "qemu-glue/qmp/qmp_client.h"
#include "transport/guest.h"

namespace presync {

// Looks at one QEMU's block devices again and again. A device counts a read when it has ended, with
// the time since it was taken up: the step of that sum between two looks is more than any read that
// ended in between has taken, and a histogram of these times (`block-latency-histogram-set`) bounds
// it more closely where many reads are under way at a time. The watch has QEMU keep one for each
// device that has none; it changes nothing else, and takes that back in Undo.
//
// A device that keeps no accounts (scsi-generic), one that was unplugged with what it had counted,
// and reads that failed uncounted make a look say that nothing is known. One thread at a time.
class RequestWatch {
 public:
  // One look, by one command to QEMU, and some more for each device that was not seen before.
  // Errors as QmpClient::Execute; then the next look covers the time since the last good one.
  absl::StatusOr<RequestLook> Look(QmpClient& qmp, absl::Time deadline);

  // No look follows: QEMU drops the histograms that it keeps for this. Waits for nothing.
  void Undo(QmpClient& qmp);

 private:
  // What is known of the reads of one device, since it was made.
  struct Reads {
    uint64_t total_ns = 0;
    uint64_t failed = 0;
    bool counts_failed = true;
    std::vector<uint64_t> boundaries_ns, bins;  // of the histogram; empty without
  };
  struct Device {
    Reads reads;
    bool keeps_accounts = false;
    bool histogram_is_ours = false;
  };

  static absl::StatusOr<Reads> ParseReads(const Json& stats);
  static absl::Duration LongestBetween(const Reads& before, const Reads& after);
  absl::Status Meet(QmpClient& qmp, const std::string& id, Device* device, absl::Time deadline);

  bool looked_ = false;
  std::map<std::string, Device> devices_;  // by what QEMU calls them (qdev id, or QOM path)
};

}  // namespace presync
