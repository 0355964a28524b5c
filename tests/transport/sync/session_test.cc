// Source session and target service together, over real sockets on loopback, with model guests:
// what a handover promises when everything works, and when any one thing does not.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <stdlib.h>

#include <atomic>
#include <filesystem>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "tests/transport/sync/model_guest.h"
#include "transport/sync/source_session.h"
#include "transport/sync/target_service.h"
#include "transport/tcp/socket.h"

namespace presync {
namespace {

using ::testing::HasSubstr;

const std::vector<PageCount> kRegions = {700, 324};
constexpr PageCount kPages = 1024;

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
  absl::Status EndOrphan(const std::string&) override {
    ++orphans_ended_;
    return absl::OkStatus();
  }

  void set_fails(std::string fails) { fails_ = std::move(fails); }
  ModelMemory& memory() { return *memory_; }
  int places_made() const { return places_made_; }
  bool kept() const { return kept_; }

 private:
  class Place final : public TargetPlace {
   public:
    explicit Place(ModelHost* host) : host_(host) {}
    const GuestMemory& memory() const override { return host_->memory_->memory(); }
    bool memory_was_zero() const override { return host_->places_made_ == 1; }
    absl::StatusOr<TargetGuest*> Waiting(absl::Time) override {
      if (guest_ == nullptr)
        guest_ = std::make_unique<ModelTargetGuest>(host_->world_, host_->fails_);
      return guest_.get();
    }
    absl::Status Check() override { return absl::OkStatus(); }
    absl::Status EndWaiting() override {
      guest_.reset();
      return absl::OkStatus();
    }
    void Keep() override { host_->kept_ = true; }
    std::string address() const override { return "model"; }

   private:
    ModelHost* const host_;
    std::unique_ptr<ModelTargetGuest> guest_;
  };

  World* const world_;
  std::unique_ptr<ModelMemory> memory_;
  std::string fails_;
  std::atomic<int> places_made_ = 0;
  std::atomic<int> orphans_ended_ = 0;
  std::atomic<bool> kept_ = false;
};

// A dialer whose connections can be cut, all at once, as a dying network does.
class CuttableDialer final : public Dialer {
 public:
  explicit CuttableDialer(uint16_t port, std::shared_ptr<std::atomic<bool>> up)
      : tcp_("127.0.0.1", port), up_(std::move(up)) {}
  absl::StatusOr<UniqueFd> Dial(const Preamble& preamble, absl::Time deadline) override {
    if (!*up_) return absl::UnavailableError("connect: the network is down, as scripted");
    return tcp_.Dial(preamble, deadline);
  }
  const std::string& peer() const override { return tcp_.peer(); }

 private:
  TcpDialer tcp_;
  std::shared_ptr<std::atomic<bool>> up_;
};

class SessionTest : public ::testing::Test {
 protected:
  SessionTest() : source_(kRegions), host_(&world_) {
    for (PageIndex page = 0; page < kPages; page += 2) source_.Write(page, page + 1);
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
    TargetServiceOptions options;
    options.record_folder = target_folder_.path();
    service_ = TargetService::Start(*std::move(listener), &host_, options);
  }

  absl::Status StartSession(const std::string& source_fails = "", int64_t device_writes = -1,
                            const std::string& name = "g1") {
    SourceSessionOptions options;
    options.guest = name;
    options.guest_address = "model";
    options.record_folder = source_folder_.path();
    options.sync.scan_interval = absl::Milliseconds(10);
    options.sync.max_launch_time = options.sync.fixed_cost;  // a set-point of 0: everything is sent
    options.reconnect_every = absl::Milliseconds(50);
    auto session = SourceSession::Start(
        options, std::make_unique<CuttableDialer>(port_, up_), CopyMemory(), source_.MakeLog(),
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
    writer_ = std::thread([this] {
      std::mt19937_64 random(7);
      while (!writing_ends_) {
        for (int i = 0; i < 20 && world_.source_running(); ++i) {
          absl::MutexLock lock(&running_mutex_);
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

  template <typename Condition>
  static bool Await(Condition condition) {
    for (int i = 0; i < 4000; ++i) {
      if (condition()) return true;
      std::this_thread::sleep_for(std::chrono::milliseconds(5));
    }
    return false;
  }
  bool AwaitState(SessionState state) {
    return Await([&] { return session_->status().state == state; });
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

  World world_;
  ModelMemory source_;
  ModelHost host_;
  TempFolder source_folder_, target_folder_;
  std::shared_ptr<std::atomic<bool>> up_ = std::make_shared<std::atomic<bool>>(true);
  uint16_t port_ = 0;
  std::unique_ptr<TargetService> service_;
  std::unique_ptr<SourceSession> session_;
  absl::Mutex running_mutex_;
  std::atomic<bool> writing_ends_ = false;
  std::thread writer_;
};

TEST_F(SessionTest, MovesAWritingGuestByteForByte) {
  StartWriting();
  ASSERT_TRUE(StartSession().ok());
  ASSERT_TRUE(AwaitState(SessionState::kSyncing));
  const absl::StatusOr<HandoverReport> report = Launch();
  ASSERT_TRUE(report.ok()) << report.status();
  EXPECT_TRUE(world_.target_running());
  EXPECT_FALSE(world_.source_running());
  EXPECT_EQ(report->pages_compared, kPages);
  EXPECT_EQ(report->pages_differing, 0u);
  EXPECT_THAT(Differences(), ::testing::IsEmpty());
  EXPECT_TRUE(host_.kept());
  EXPECT_EQ(session_->status().state, SessionState::kMoved);
  EXPECT_TRUE(std::filesystem::is_empty(source_folder_.path())) << "the source's record is settled";
}

TEST_F(SessionTest, WhatDeviceCodeWritesWhileItsStateIsSavedArrivesToo) {
  ASSERT_TRUE(StartSession("", /*device_writes=*/333).ok());
  ASSERT_TRUE(Launch().ok());
  EXPECT_THAT(Differences(), ::testing::IsEmpty());
  EXPECT_FALSE(source_.scratch().IsZeroPage(333));
}

class FailingSource : public SessionTest, public ::testing::WithParamInterface<const char*> {};

TEST_P(FailingSource, TheGuestGoesOnHere) {
  ASSERT_TRUE(StartSession(GetParam()).ok());
  const absl::StatusOr<HandoverReport> report = Launch();
  ASSERT_FALSE(report.ok());
  EXPECT_THAT(std::string(report.status().message()), HasSubstr(GetParam()));
  ExpectUnharmed();
}

INSTANTIATE_TEST_SUITE_P(Steps, FailingSource,
                         ::testing::Values("prepare-save", "begin-save", "stop", "finish-save"));

class FailingTarget : public SessionTest, public ::testing::WithParamInterface<const char*> {};

TEST_P(FailingTarget, TheGuestGoesOnHereAndALaterLaunchWorks) {
  host_.set_fails(GetParam());
  StartWriting();
  ASSERT_TRUE(StartSession().ok());
  const absl::StatusOr<HandoverReport> report = Launch();
  ASSERT_FALSE(report.ok());
  EXPECT_THAT(std::string(report.status().message()), HasSubstr(GetParam()));
  ExpectUnharmed();

  host_.set_fails("");
  const absl::StatusOr<HandoverReport> again = Launch();
  ASSERT_TRUE(again.ok()) << again.status();
  EXPECT_TRUE(world_.target_running());
  EXPECT_THAT(Differences(), ::testing::IsEmpty());
}

INSTANTIATE_TEST_SUITE_P(Steps, FailingTarget,
                         ::testing::Values("begin-load", "await-loaded", "run"));

TEST_F(SessionTest, GivenUpAndUnansweredTheSourceAsksAndDoesNotResume) {
  host_.set_fails("run-unanswered");
  StartWriting();
  ASSERT_TRUE(StartSession().ok());
  const absl::StatusOr<HandoverReport> report = Launch();
  EXPECT_TRUE(report.ok()) << report.status();
  EXPECT_EQ(session_->status().state, SessionState::kMoved);
  EXPECT_TRUE(world_.target_running());
  EXPECT_FALSE(world_.source_running());
  EXPECT_THAT(Differences(), ::testing::IsEmpty());
}

TEST_F(SessionTest, APageThatDiffersIsFoundAndTheGuestStays) {
  ASSERT_TRUE(StartSession().ok());
  ASSERT_TRUE(Await([&] { return session_->status().progress.residual == 0; }));
  // Behind dirty tracking's back, as a device with a mapping of its own would.
  source_.scratch().FillPage(801, 4711);
  const absl::StatusOr<HandoverReport> report = Launch();
  ASSERT_FALSE(report.ok());
  EXPECT_EQ(report.status().code(), absl::StatusCode::kDataLoss);
  EXPECT_THAT(std::string(report.status().message()), HasSubstr("first: 801"));
  ExpectUnharmed();
}

TEST_F(SessionTest, ResumesOverALostLinkWithoutSendingEverythingAgain) {
  ASSERT_TRUE(StartSession().ok());
  ASSERT_TRUE(AwaitState(SessionState::kSyncing));
  ASSERT_TRUE(Await([&] { return session_->status().progress.residual == 0; }));
  const uint64_t sent = session_->status().progress.pages_sent;
  service_->CloseConnections();
  ASSERT_TRUE(AwaitReconnect());
  ASSERT_TRUE(AwaitState(SessionState::kSyncing));
  EXPECT_EQ(host_.places_made(), 1);
  source_.Write(5, 12345);
  const absl::StatusOr<HandoverReport> report = Launch();
  ASSERT_TRUE(report.ok()) << report.status();
  EXPECT_LE(session_->status().progress.pages_sent, sent + 1);
  EXPECT_THAT(Differences(), ::testing::IsEmpty());
}

TEST_F(SessionTest, ATargetThatStartsAnewGetsEverythingAgain) {
  ASSERT_TRUE(StartSession().ok());
  ASSERT_TRUE(AwaitState(SessionState::kSyncing));
  const uint16_t port = port_;
  service_.reset();
  for (PageIndex page = 0; page < kPages; ++page) host_.memory().Write(page, 99 + page);
  StartTarget(port);
  ASSERT_TRUE(AwaitReconnect());
  const absl::StatusOr<HandoverReport> report = Launch();
  ASSERT_TRUE(report.ok()) << report.status();
  EXPECT_THAT(Differences(), ::testing::IsEmpty());
}

TEST_F(SessionTest, StopTellsTheTargetToForget) {
  ASSERT_TRUE(StartSession().ok());
  ASSERT_TRUE(AwaitState(SessionState::kSyncing));
  EXPECT_EQ(service_->status().size(), 1u);
  ASSERT_TRUE(session_->Stop().ok());
  EXPECT_TRUE(Await([&] { return service_->status().empty(); }));
  ExpectUnharmed();
  EXPECT_FALSE(Launch().ok());
}

TEST_F(SessionTest, AGuestThatIsNotConfiguredThereIsRefusedWithTheReason) {
  const absl::Status status = StartSession("", -1, "g2");
  EXPECT_EQ(status.code(), absl::StatusCode::kNotFound);
  EXPECT_THAT(std::string(status.message()), HasSubstr("not configured here"));
}

TEST_F(SessionTest, ASecondSourceOfTheSameGuestIsRefused) {
  ASSERT_TRUE(StartSession().ok());
  std::unique_ptr<SourceSession> first = std::move(session_);
  const absl::Status status = StartSession();
  EXPECT_EQ(status.code(), absl::StatusCode::kAlreadyExists) << status;
  session_ = std::move(first);
}

TEST_F(SessionTest, ALaunchBeforeTheFirstPassIsRefusedUnlessItMayWait) {
  ASSERT_TRUE(StartSession().ok());
  HandoverOptions options;
  const absl::StatusOr<HandoverReport> at_once = session_->Launch(options, absl::ZeroDuration());
  if (!at_once.ok()) {  // else the first pass was faster than this test, which is fine
    EXPECT_EQ(at_once.status().code(), absl::StatusCode::kFailedPrecondition);
    EXPECT_THAT(std::string(at_once.status().message()), HasSubstr("first-pass"));
    EXPECT_TRUE(Launch().ok());
  }
}

TEST_F(SessionTest, GarbageAtThePortHarmsNobody) {
  ASSERT_TRUE(StartSession().ok());
  std::mt19937_64 random(3);
  for (int i = 0; i < 20; ++i) {
    absl::StatusOr<UniqueFd> socket = Connect("127.0.0.1", port_, absl::Now() + absl::Seconds(5));
    ASSERT_TRUE(socket.ok());
    std::string bytes(1 + random() % 5000, '\0');
    for (char& c : bytes) c = static_cast<char>(random());
    if (i % 2 == 0) {  // a good preamble, and garbage behind it
      const auto preamble = EncodePreamble({.kind = Preamble::Kind::kControl});
      bytes.insert(0, reinterpret_cast<const char*>(preamble.data()), preamble.size());
    }
    (void)!::write(socket->get(), bytes.data(), bytes.size());
  }
  ASSERT_TRUE(Launch().ok());
  EXPECT_THAT(Differences(), ::testing::IsEmpty());
}

}  // namespace
}  // namespace presync
