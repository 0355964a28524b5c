#include "tests/qemu-glue/synthetic_pair.h"

#include <sys/socket.h>
#include <unistd.h>

#include <cstring>
#include <utility>

#include "predictor/check.h"
#include "transport/clock.h"

namespace presync::testing {
namespace {

constexpr uint64_t kSourceSeed = 1;
// Each vCPU rests after each write.
constexpr uint32_t kRestMicroseconds = 500;

UniqueFd MakeStream(UniqueFd* other) {
  int ends[2];
  PRESYNC_CHECK(::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends) == 0);
  other->reset(ends[0]);
  return UniqueFd(ends[1]);
}

}  // namespace

GuestMemory MapRam(const SyntheticGuest& guest) {
  std::vector<Region> regions;
  for (size_t i = 0; i < guest.files().size(); ++i) {
    absl::StatusOr<Region> region = Region::Adopt(
        "ram" + std::to_string(i), "the synthetic guest's RAM",
        UniqueFd(::dup(guest.files()[i].get())), PagesToBytes(guest.regions()[i].run.count));
    PRESYNC_CHECK(region.ok());
    regions.push_back(*std::move(region));
  }
  absl::StatusOr<GuestMemory> memory = GuestMemory::Create(std::move(regions));
  PRESYNC_CHECK(memory.ok());
  return *std::move(memory);
}

void StartVcpus(SyntheticGuest* guest, uint64_t seed) {
  PRESYNC_CHECK(guest->Do(GUEST_START_WRITERS, 0, 0, kRestMicroseconds + 1, seed) == 0);
}

void StopVcpus(SyntheticGuest* guest) { PRESYNC_CHECK(guest->Do(GUEST_STOP_WRITERS) == 0); }

std::vector<PageIndex> Differences(const SyntheticGuest& a, const SyntheticGuest& b) {
  std::vector<PageIndex> pages;
  for (PageIndex page = 0; page < a.pages(); ++page) {
    if (std::memcmp(a.Page(page), b.Page(page), kPageBytes) != 0) pages.push_back(page);
  }
  return pages;
}

absl::StatusOr<UniqueFd> SyntheticSourceGuest::BeginSave(absl::Time) {
  return MakeStream(&stream_);
}

absl::StatusOr<absl::Time> SyntheticSourceGuest::Stop(absl::Time) {
  StopVcpus(guest_);
  running_ = false;
  return MonotonicNow();
}

absl::Status SyntheticSourceGuest::FinishSave(absl::Time) {
  const uint64_t seed = kSourceSeed + 1;
  const bool ok = ::write(stream_.get(), &seed, sizeof(seed)) == sizeof(seed);
  stream_.reset();
  return ok ? absl::OkStatus() : absl::UnavailableError("nobody reads the device state");
}

absl::Status SyntheticSourceGuest::Resume(absl::Time) {
  stream_.reset();
  if (!running_) StartVcpus(guest_, kSourceSeed);
  running_ = true;
  return absl::OkStatus();
}

absl::Status SyntheticSourceGuest::StandsStill(absl::Time) {
  return running_ ? absl::FailedPreconditionError("it runs") : absl::OkStatus();
}

absl::Status SyntheticSourceGuest::HoldStill(absl::Time) {
  return running_ ? absl::AbortedError("it runs") : absl::OkStatus();
}

absl::StatusOr<RunState> SyntheticSourceGuest::State(absl::Time) {
  return running_ ? RunState::kRunning : RunState::kPaused;
}

class SyntheticHost::Waiting final : public TargetGuest {
 public:
  explicit Waiting(SyntheticHost* host) : host_(host) {}

  absl::StatusOr<UniqueFd> BeginLoad(absl::Time) override { return MakeStream(&stream_); }

  absl::Status AwaitLoaded(absl::Time) override {
    char behind;
    loaded_ = ::read(stream_.get(), &seed_, sizeof(seed_)) == sizeof(seed_) &&
              ::read(stream_.get(), &behind, 1) == 0;
    return loaded_ ? absl::OkStatus() : absl::DataLossError("the device state is not a seed");
  }

  absl::Status Run(absl::Time) override {
    PRESYNC_CHECK(loaded_);
    host_->differences_ = Differences(*host_->source_, host_->guest_);
    StartVcpus(&host_->guest_, seed_);
    host_->runs_ = true;
    return absl::OkStatus();
  }

  absl::Status Discard(absl::Time) override { return absl::OkStatus(); }
  absl::StatusOr<RunState> State(absl::Time) override {
    return loaded_ ? RunState::kPaused : RunState::kIncoming;
  }

 private:
  SyntheticHost* const host_;
  UniqueFd stream_;
  uint64_t seed_ = 0;
  bool loaded_ = false;
};

class SyntheticHost::Place final : public TargetPlace {
 public:
  explicit Place(SyntheticHost* host) : host_(host), memory_(MapRam(host->guest_)) {}

  const GuestMemory& memory() const override { return memory_; }
  bool memory_was_zero() const override { return host_->places_made_ == 1; }
  absl::StatusOr<TargetGuest*> Waiting(absl::Time) override {
    if (waiting_ == nullptr) waiting_ = std::make_unique<SyntheticHost::Waiting>(host_);
    return waiting_.get();
  }
  absl::Status Check() override { return absl::OkStatus(); }
  absl::Status EndWaiting() override {
    waiting_.reset();
    return absl::OkStatus();
  }
  void Keep() override {}
  std::string address() const override { return "synthetic"; }
  std::string process() const override { return "synthetic"; }

 private:
  SyntheticHost* const host_;
  const GuestMemory memory_;
  std::unique_ptr<SyntheticHost::Waiting> waiting_;
};

absl::StatusOr<std::unique_ptr<TargetPlace>> SyntheticHost::MakePlace(
    const std::string&, const std::vector<RegionRequest>&) {
  ++places_made_;
  return std::make_unique<Place>(this);
}

}  // namespace presync::testing
