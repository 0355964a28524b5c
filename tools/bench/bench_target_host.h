// What the server of a link benchmark offers to who comes: scratch memory, and no guest at all.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "transport/mutex.h"
#include "transport/sync/target_host.h"

namespace presync {

// A TargetHost whose places are shared memory without a name, zeroed. It can't take a handover: its
// waiting guests refuse. Must outlive its places.
class BenchTargetHost final : public TargetHost {
 public:
  // `folder`: on tmpfs or hugetlbfs. `max_bytes`: of all places at a time.
  BenchTargetHost(std::string folder, uint64_t max_bytes)
      : folder_(std::move(folder)), max_bytes_(max_bytes) {}

  // RESOURCE_EXHAUSTED: more than `max_bytes`, or than the host has.
  absl::StatusOr<std::unique_ptr<TargetPlace>> MakePlace(
      const std::string& guest, const std::vector<RegionRequest>& regions) override;
  absl::Status EndOrphan(const HandoverEntry&) override { return absl::OkStatus(); }

  // How many places have come to their end.
  uint64_t places_ended() const ABSL_LOCKS_EXCLUDED(mutex_);

 private:
  class Place;
  const std::string folder_;
  const uint64_t max_bytes_;
  mutable Mutex mutex_;
  uint64_t bytes_ ABSL_GUARDED_BY(mutex_) = 0;
  uint64_t places_ended_ ABSL_GUARDED_BY(mutex_) = 0;
};

// A folder under /tmp that is removed with all that is in it: a target service wants one for its
// records, and a benchmark's are worth nothing afterwards.
class TemporaryFolder {
 public:
  // The system's own error.
  static absl::StatusOr<std::unique_ptr<TemporaryFolder>> Create();
  TemporaryFolder(const TemporaryFolder&) = delete;
  TemporaryFolder& operator=(const TemporaryFolder&) = delete;
  ~TemporaryFolder();
  const std::string& path() const { return path_; }

 private:
  explicit TemporaryFolder(std::string path) : path_(std::move(path)) {}
  const std::string path_;
};

// Guest memory of one region ("bench"), zeroed and touched, in a file of `folder` whose name is
// gone when it returns. Errors as Region::Create.
absl::StatusOr<GuestMemory> MakeScratchMemory(const std::string& folder, uint64_t bytes);

}  // namespace presync
