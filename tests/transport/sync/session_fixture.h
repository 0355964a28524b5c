// Source session and target service together, over real sockets on loopback, with model guests.
#pragma once

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <stdlib.h>

#include <atomic>
#include <filesystem>
#include <functional>
#include <memory>
#include <optional>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "tests/transport/sync/model_guest.h"
#include "transport/sync/source_session.h"
#include "transport/sync/target_service.h"
#include "transport/tcp/socket.h"

namespace presync {

inline const std::vector<PageCount> kRegions = {700, 324};
inline constexpr PageCount kPages = 1024;

class TempFolder {
 public:
  TempFolder() {
    char name[] = "/tmp/presync-session-test-XXXXXX";
    path_ = ::mkdtemp(name);
  }
  ~TempFolder() { std::filesystem::remove_all(path_); }
  const std::string& path() const { return path_; }

 private:
  std::string path_;
};

// A target host with one model guest, whose memory outlives the places made of it, to look at.
class ModelHost final : public TargetHost {
 public:
  explicit ModelHost(World* world)
      : world_(world), memory_(std::make_unique<ModelMemory>(kRegions)) {}

  absl::StatusOr<std::unique_ptr<TargetPlace>> MakePlace(
      const std::string& guest, const std::vector<RegionRequest>& regions) override {
    if (guest != "g1") return absl::NotFoundError("guest " + guest + " is not configured here");
    ++places_made_;
    (void)regions;
    return std::make_unique<Place>(this);
  }
  absl::Status EndOrphan(const HandoverEntry&) override {
    ++orphans_ended_;
    return orphan_;
  }

  // As if places were made by this host's presyncd itself: a copy outlives it.
  std::vector<KeptPlace> TakeKept(
      const std::function<bool(const CopyOwner&)>& may_be_used) override {
    std::vector<KeptPlace> kept;
    const std::optional<CopyOwner> owner = std::exchange(note_, std::nullopt);
    if (!owner || !may_be_used(*owner)) return kept;
    note_ = owner;
    kept.push_back({*owner, std::make_unique<Place>(this)});
    return kept;
  }

  void set_fails(std::string fails) { fails_ = std::move(fails); }
  // What becomes of an orphan that is to be ended.
  void set_orphan(absl::Status ends) { orphan_ = std::move(ends); }
  void set_keeps_copies() { keeps_copies_ = true; }
  // The process that waits ends, though nobody asked it to.
  void set_waiting_gone() { waiting_gone_ = true; }
  // What is found when a guest of this shape is compared with the one that waits. Before a session.
  void set_compare(std::function<ShapeComparison(const GuestShape&)> compare) {
    compare_ = std::move(compare);
  }
  void set_last_words(std::string words) { last_words_ = std::move(words); }
  // What a presyncd that comes after a kill would find.
  bool noted() const { return note_.has_value(); }
  ModelMemory& memory() { return *memory_; }
  int places_made() const { return places_made_; }
  bool kept() const { return kept_; }
  int orphans_ended() const { return orphans_ended_; }

 private:
  class Place final : public TargetPlace {
   public:
    explicit Place(ModelHost* host) : host_(host) {}
    ~Place() override {
      if (!left_) host_->note_.reset();
    }
    const GuestMemory& memory() const override { return host_->memory_->memory(); }
    bool memory_was_zero() const override { return host_->places_made_ == 1; }
    absl::StatusOr<TargetGuest*> Waiting(absl::Time) override {
      if (!Check().ok()) EndWaiting().IgnoreError();
      if (guest_ == nullptr)
        guest_ = std::make_unique<ModelTargetGuest>(host_->world_, host_->fails_);
      return guest_.get();
    }
    absl::Status Check() override {
      if (!host_->waiting_gone_) return absl::OkStatus();
      return absl::UnavailableError("the waiting guest has ended, as scripted");
    }
    ShapeComparison Compare(const GuestShape& source, absl::Time) override {
      return host_->compare_(source);
    }
    std::string LastWords() override { return host_->last_words_; }
    absl::Status EndWaiting() override {
      unknown_ |= host_->waiting_gone_.exchange(false);
      guest_.reset();
      return absl::OkStatus();
    }
    bool TakeUnknown() override { return std::exchange(unknown_, false); }
    void Keep() override { host_->kept_ = true; }
    std::string address() const override { return "model"; }
    std::string process() const override { return "the model"; }
    absl::Status NoteCopy(const CopyOwner& owner) override {
      if (!host_->keeps_copies_) return TargetPlace::NoteCopy(owner);
      host_->note_ = owner;
      return absl::OkStatus();
    }
    absl::Status ForgetCopy() override {
      host_->note_.reset();
      return absl::OkStatus();
    }
    void Leave() override { left_ = true; }

   private:
    ModelHost* const host_;
    bool left_ = false;
    bool unknown_ = false;
    std::unique_ptr<ModelTargetGuest> guest_;
  };

  World* const world_;
  std::unique_ptr<ModelMemory> memory_;
  std::string fails_;
  std::string last_words_;
  std::function<ShapeComparison(const GuestShape&)> compare_ = [](const GuestShape&) {
    return ShapeComparison();
  };
  absl::Status orphan_;
  bool keeps_copies_ = false;
  std::optional<CopyOwner> note_;  // on disk, so to say
  std::atomic<int> places_made_ = 0;
  std::atomic<int> orphans_ended_ = 0;
  std::atomic<bool> kept_ = false;
  std::atomic<bool> waiting_gone_ = false;
};

// A dialer whose connections can be cut, all at once, as a dying network does.
class CuttableDialer final : public Dialer {
 public:
  // `broken_links`: so many links break as soon as the target has them.
  explicit CuttableDialer(uint16_t port, std::shared_ptr<std::atomic<bool>> up,
                          std::atomic<int>* broken_links)
      : tcp_("127.0.0.1", port), up_(std::move(up)), broken_links_(broken_links) {}
  absl::StatusOr<Connection> Dial(const Preamble& preamble, absl::Time deadline) override {
    if (!*up_) return absl::UnavailableError("connect: the network is down, as scripted");
    absl::StatusOr<Connection> dialed = tcp_.Dial(preamble, deadline);
    if (preamble.kind != Preamble::Kind::kData || *broken_links_ == 0) return dialed;
    // The last stream makes it whole there. Not at once, or the target would not have taken it.
    if (preamble.stream + 1 < SourceSessionOptions().tcp_streams) return dialed;
    std::this_thread::sleep_for(std::chrono::milliseconds(200));
    --*broken_links_;
    return absl::UnavailableError("connect: lost, as scripted");
  }
  const std::string& peer() const override { return tcp_.peer(); }

 private:
  TcpDialer tcp_;
  std::shared_ptr<std::atomic<bool>> up_;
  std::atomic<int>* const broken_links_;
};

class SessionTest : public ::testing::Test {
 protected:
  SessionTest() : source_(kRegions), host_(&world_) {
    for (PageIndex page = 0; page < kPages; page += 2) source_.Write(page, page + 1);
    source_options_.watch_every = absl::Milliseconds(50);
    StartTarget();
  }

  ~SessionTest() override {
    StopWriting();
    session_.reset();
    service_.reset();
    EXPECT_FALSE(world_.ever_both()) << "two guests ran";
  }

  void StartTarget(uint16_t port = 0) {
    absl::StatusOr<UniqueFd> listener = Listen("127.0.0.1", port);
    ASSERT_TRUE(listener.ok()) << listener.status();
    port_ = *BoundPort(listener->get());
    TargetServiceOptions options = target_options_;
    options.record_folder = target_folder_.path();
    service_ = TargetService::Start(*std::move(listener), &host_, options);
  }

  absl::Status StartSession(const std::string& source_fails = "", int64_t device_writes = -1,
                            const std::string& name = "g1") {
    SourceSessionOptions options = source_options_;
    options.guest = name;
    options.guest_address = "model";
    options.record_folder = source_folder_.path();
    options.sync.scan_interval = absl::Milliseconds(10);
    options.sync.max_launch_time = options.sync.fixed_cost;  // a set-point of 0: everything is sent
    options.reconnect_every = absl::Milliseconds(50);
    options.look_every = options.settle_few_every = options.sync.settle_after =
        absl::Milliseconds(30);
    auto session = SourceSession::Start(
        options, std::make_unique<CuttableDialer>(port_, up_, &broken_links_), CopyMemory(),
        source_.MakeLog(),
        std::make_unique<ModelSourceGuest>(&world_, &source_, source_fails, device_writes));
    if (session.ok()) session_ = *std::move(session);
    return session.status();
  }

  // The session owns a mapping of its own, as presyncd does.
  GuestMemory CopyMemory() {
    std::vector<Region> regions;
    for (const Region& region : source_.memory().regions()) {
      absl::StatusOr<Region> again = Region::Adopt(
          region.name(), "the test's memory", UniqueFd(::dup(region.fd())), region.size_bytes());
      EXPECT_TRUE(again.ok()) << again.status();
      regions.push_back(*std::move(again));
    }
    return *GuestMemory::Create(std::move(regions));
  }

  // The guest writes, hard, whenever it runs on the source.
  void StartWriting() {
    writing_ends_ = false;
    writer_ = std::thread([this] {
      std::mt19937_64 random(7);
      while (!writing_ends_) {
        for (int i = 0; i < 20 && world_.source_running(); ++i) {
          MutexLock lock(&running_mutex_);
          if (!world_.source_running()) break;
          const PageIndex page =
              static_cast<PageIndex>(random() % (random() % 4 == 0 ? kPages : 50));
          source_.Write(page, random() % 9 == 0 ? 0 : random() | 1);
        }
        std::this_thread::sleep_for(std::chrono::microseconds(500));
      }
    });
  }
  void StopWriting() {
    writing_ends_ = true;
    if (writer_.joinable()) writer_.join();
  }

  absl::StatusOr<HandoverReport> Launch(bool verify = true) {
    HandoverOptions options;
    options.verify = verify;
    options.switchover_timeout = absl::Seconds(5);
    return session_->Launch(options, absl::Seconds(30));
  }

  // 20 s: long enough for any machine; emulation of one needs more.
  template <typename Condition>
  bool Await(Condition condition) {
    for (int i = 0; i < patience_; ++i) {
      if (condition()) return true;
      std::this_thread::sleep_for(std::chrono::milliseconds(5));
    }
    return false;
  }
  bool AwaitState(SessionState state) {
    return Await([&] { return session_->status().state == state; });
  }
  // For a guest that writes: it rests meanwhile. On a busy machine the pacer may leave the sync
  // less than such a guest writes, and then nothing but a launch, which is not paced, gets through.
  bool AwaitSyncingAtRest() {
    StopWriting();
    const bool syncing = AwaitState(SessionState::kSyncing);
    StartWriting();
    return syncing;
  }
  bool AwaitReconnect() {
    return Await([&] { return session_->status().reconnects > 0; });
  }

  std::vector<PageIndex> Differences() {
    return source_.scratch().Differences(host_.memory().scratch());
  }

  // Called off, and as if nothing had happened: the guest runs here, and a later launch works.
  void ExpectUnharmed() {
    EXPECT_TRUE(world_.source_running());
    EXPECT_FALSE(world_.target_running());
  }

  // For tests of links: set before the target, or the session, is started.
  TargetServiceOptions target_options_;
  SourceSessionOptions source_options_;
  World world_;
  ModelMemory source_;
  ModelHost host_;
  TempFolder source_folder_, target_folder_;
  std::shared_ptr<std::atomic<bool>> up_ = std::make_shared<std::atomic<bool>>(true);
  std::atomic<int> broken_links_ = 0;
  int patience_ = 4000;  // times 5 ms
  uint16_t port_ = 0;
  std::unique_ptr<TargetService> service_;
  std::unique_ptr<SourceSession> session_;
  Mutex running_mutex_;
  std::atomic<bool> writing_ends_ = false;
  std::thread writer_;
};

}  // namespace presync
