// A synthetic guest (dirty_log/guest_fixture.h) on both sides of a handover: a process that writes
// into its RAM, with the real library preloaded, and one on the target whose RAM is the mirror. Its
// "device state" is the seed from which its vCPUs go on.
#pragma once

#include <atomic>
#include <memory>
#include <string>
#include <vector>

#include "tests/qemu-glue/dirty_log/guest_fixture.h"
#include "transport/guest.h"
#include "transport/memory.h"
#include "transport/sync/target_host.h"

namespace presync::testing {

// Guest RAM of `guest` as presyncd maps it. Aborts the test program if that fails.
GuestMemory MapRam(const SyntheticGuest& guest);

// Its vCPUs: threads that write pages at random, each about 2000 a second.
void StartVcpus(SyntheticGuest* guest, uint64_t seed);
void StopVcpus(SyntheticGuest* guest);

// Pages whose bytes differ. Both guests stand still meanwhile, or the answer means nothing.
std::vector<PageIndex> Differences(const SyntheticGuest& a, const SyntheticGuest& b);

// Of a guest that runs when this is made, and outlives it.
class SyntheticSourceGuest final : public SourceGuest {
 public:
  explicit SyntheticSourceGuest(SyntheticGuest* guest) : guest_(guest) {}

  absl::Status PrepareSave(absl::Time) override { return absl::OkStatus(); }
  absl::StatusOr<UniqueFd> BeginSave(absl::Time deadline) override;
  absl::StatusOr<absl::Time> Stop(absl::Time deadline) override;
  absl::Status FinishSave(absl::Time deadline) override;
  absl::Status Resume(absl::Time deadline) override;
  // Not killed, so that a test can look at its memory.
  absl::Status Quit(absl::Time) override { return absl::OkStatus(); }
  absl::StatusOr<RunState> State(absl::Time deadline) override;
  absl::Status StandsStill(absl::Time deadline) override;
  absl::Status HoldStill(absl::Time deadline) override;

 private:
  SyntheticGuest* const guest_;
  UniqueFd stream_;
  bool running_ = true;
};

// A host for one guest. Its memory is looked at in the moment before its vCPUs run for the first
// time.
class SyntheticHost final : public TargetHost {
 public:
  SyntheticHost(const SyntheticGuest* source, const std::vector<GuestRegionSpec>& specs)
      : source_(source), guest_(specs) {}

  absl::StatusOr<std::unique_ptr<TargetPlace>> MakePlace(
      const std::string& guest, const std::vector<RegionRequest>& regions) override;
  absl::Status EndOrphan(const HandoverEntry&) override { return absl::OkStatus(); }

  // After a handover.
  bool runs() const { return runs_; }
  const std::vector<PageIndex>& differences() const { return differences_; }
  SyntheticGuest* guest() { return &guest_; }
  int places_made() const { return places_made_; }

 private:
  class Place;
  class Waiting;
  const SyntheticGuest* const source_;
  // Started here and not by a conversation's thread: it dies with the thread that started it.
  SyntheticGuest guest_;
  std::vector<PageIndex> differences_;
  std::atomic<bool> runs_ = false;
  std::atomic<int> places_made_ = 0;
};

}  // namespace presync::testing
