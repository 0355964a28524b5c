#include "tools/bench/bench_target_host.h"

#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstdlib>
#include <filesystem>
#include <system_error>
#include <utility>

#include "absl/strings/str_cat.h"
#include "tools/common/units.h"

namespace presync {
namespace {

// Nobody waits here.
class NoGuest final : public TargetGuest {
 public:
  absl::StatusOr<UniqueFd> BeginLoad(absl::Time) override { return Refusal(); }
  absl::Status AwaitLoaded(absl::Time) override { return Refusal(); }
  absl::Status Run(absl::Time) override { return Refusal(); }
  absl::Status Discard(absl::Time) override { return absl::OkStatus(); }
  absl::StatusOr<RunState> State(absl::Time) override { return RunState::kIncoming; }

 private:
  static absl::Status Refusal() {
    return absl::FailedPreconditionError(
        "this is the server of a benchmark (presync bench link): it runs no guests");
  }
};

// A region in a file that no other call or process uses, and whose name is gone at once.
absl::StatusOr<Region> MakeScratchRegion(const std::string& folder, const std::string& name,
                                         uint64_t bytes) {
  static std::atomic<uint64_t> next = 0;
  const std::string path = absl::StrCat(folder, "/presync-bench-", ::getpid(), "-", next++);
  absl::StatusOr<Region> region = Region::Create(name, path, bytes);
  if (!region.ok()) return region.status();
  ::unlink(path.c_str());
  // Page faults are not what is measured. Linux before 5.14 refuses this, and faults later.
  ::madvise(region->data(), region->size_bytes(), MADV_POPULATE_WRITE);
  return region;
}

absl::StatusOr<GuestMemory> MakeMemory(const std::string& folder,
                                       const std::vector<RegionRequest>& requests) {
  std::vector<Region> regions;
  for (const RegionRequest& request : requests) {
    absl::StatusOr<Region> region = MakeScratchRegion(folder, request.name, request.size_bytes);
    if (!region.ok()) return region.status();
    regions.push_back(*std::move(region));
  }
  return GuestMemory::Create(std::move(regions));
}

}  // namespace

class BenchTargetHost::Place final : public TargetPlace {
 public:
  Place(BenchTargetHost* host, GuestMemory memory) : host_(host), memory_(std::move(memory)) {}
  ~Place() override {
    MutexLock lock(&host_->mutex_);
    host_->bytes_ -= PagesToBytes(memory_.pages());
    ++host_->places_ended_;
  }

  const GuestMemory& memory() const override { return memory_; }
  bool memory_was_zero() const override { return true; }
  absl::StatusOr<TargetGuest*> Waiting(absl::Time) override { return &no_guest_; }
  absl::Status Check() override { return absl::OkStatus(); }
  absl::Status EndWaiting() override { return absl::OkStatus(); }
  void Keep() override {}
  std::string address() const override { return "no guest: a benchmark"; }
  std::string process() const override { return ""; }

 private:
  BenchTargetHost* const host_;
  const GuestMemory memory_;
  NoGuest no_guest_;
};

absl::StatusOr<std::unique_ptr<TargetPlace>> BenchTargetHost::MakePlace(
    const std::string&, const std::vector<RegionRequest>& regions) {
  uint64_t bytes = 0;
  for (const RegionRequest& region : regions) bytes += region.size_bytes;
  {
    MutexLock lock(&mutex_);
    if (bytes > max_bytes_ - bytes_) {
      return absl::ResourceExhaustedError(absl::StrCat(
          "the benchmark's server has ", FormatBytes(max_bytes_ - bytes_), " to give, not ",
          FormatBytes(bytes), ": start it with a larger --memory, or ask for less"));
    }
    bytes_ += bytes;
  }
  absl::StatusOr<GuestMemory> memory = MakeMemory(folder_, regions);
  if (memory.ok()) return std::make_unique<Place>(this, *std::move(memory));
  MutexLock lock(&mutex_);
  bytes_ -= bytes;
  return memory.status();
}

uint64_t BenchTargetHost::places_ended() const {
  MutexLock lock(&mutex_);
  return places_ended_;
}

absl::StatusOr<std::unique_ptr<TemporaryFolder>> TemporaryFolder::Create() {
  char path[] = "/tmp/presync-bench-XXXXXX";
  if (::mkdtemp(path) == nullptr) return absl::ErrnoToStatus(errno, "make a folder under /tmp");
  return std::unique_ptr<TemporaryFolder>(new TemporaryFolder(path));
}

TemporaryFolder::~TemporaryFolder() {
  std::error_code ignored;
  std::filesystem::remove_all(path_, ignored);
}

absl::StatusOr<GuestMemory> MakeScratchMemory(const std::string& folder, uint64_t bytes) {
  return MakeMemory(folder, {{.name = "bench", .size_bytes = bytes}});
}

}  // namespace presync
