// Sessions of a guest that has a manager (libvirt), over real sockets on loopback: whoever begins a
// launch, the guest runs once, whole, and its memory is left out of nothing but launches.
#include <condition_variable>

#include "tests/transport/sync/session_fixture.h"
#include "transport/clock.h"

namespace presync {
namespace {

using ::testing::HasSubstr;

// What the test, as the manager, and the session share. Thread-safe.
struct Manager {
  std::atomic<bool> expected = false;
  std::atomic<bool> begun = false;
  std::atomic<bool> goes_on = false;  // lets the guest go on while a launch is under way
  std::atomic<int> orders = 0;
  std::atomic<int> held_still = 0;
  Mutex mutex;
  std::optional<absl::Status> order_end ABSL_GUARDED_BY(mutex);
};

class ManagedGuest final : public SourceGuest, public ManagedLaunch {
 public:
  ManagedGuest(Manager* manager, std::unique_ptr<SourceGuest> guest)
      : manager_(manager), guest_(std::move(guest)) {}

  absl::Status PrepareSave(absl::Time deadline) override { return guest_->PrepareSave(deadline); }
  absl::StatusOr<UniqueFd> BeginSave(absl::Time deadline) override {
    if (!manager_->begun) return absl::FailedPreconditionError("the manager has not begun");
    return guest_->BeginSave(deadline);
  }
  absl::StatusOr<absl::Time> Stop(absl::Time deadline) override { return guest_->Stop(deadline); }
  absl::Status FinishSave(absl::Time deadline) override { return guest_->FinishSave(deadline); }
  absl::Status Resume(absl::Time deadline) override {
    manager_->begun = false;
    manager_->expected = false;
    return guest_->Resume(deadline);
  }
  absl::Status Quit(absl::Time deadline) override { return guest_->Quit(deadline); }
  absl::StatusOr<RunState> State(absl::Time deadline) override { return guest_->State(deadline); }
  ManagedLaunch* managed() override { return this; }

  absl::Status Expect(absl::Time) override {
    manager_->expected = true;
    return absl::OkStatus();
  }
  void Forget() override {
    if (!manager_->begun) manager_->expected = false;
  }
  bool expected() const override { return manager_->expected; }
  absl::Status Order() override {
    ++manager_->orders;
    return absl::OkStatus();
  }
  std::optional<absl::Status> TakeOrderEnd() override {
    MutexLock lock(&manager_->mutex);
    return std::exchange(manager_->order_end, std::nullopt);
  }
  bool Begun() override { return manager_->begun && manager_->expected; }
  absl::Status TakeReturn(absl::string_view) override { return absl::OkStatus(); }
  absl::Status StandsStill(absl::Time) override {
    if (!manager_->goes_on) return absl::OkStatus();
    return absl::FailedPreconditionError("the manager let it go on");
  }
  absl::Status HoldStill(absl::Time) override {
    ++manager_->held_still;
    return absl::OkStatus();
  }

 private:
  Manager* const manager_;
  const std::unique_ptr<SourceGuest> guest_;
};

class ManagedSession : public SessionTest {
 protected:
  ~ManagedSession() override { session_.reset(); }

  void Start(const std::string& fails = "") {
    SourceSessionOptions options;
    options.guest = "g1";
    options.guest_address = "model";
    options.record_folder = source_folder_.path();
    options.sync.scan_interval = absl::Milliseconds(10);
    options.sync.max_launch_time = options.sync.fixed_cost;
    options.reconnect_every = absl::Milliseconds(50);
    options.on_managed_launch = [this](absl::Time, const absl::StatusOr<HandoverReport>& report) {
      MutexLock lock(&mutex_);
      own_launches_.push_back(report.status());
    };
    auto session = SourceSession::Start(
        options, std::make_unique<CuttableDialer>(port_, up_, &broken_links_), CopyMemory(),
        source_.MakeLog(),
        std::make_unique<ManagedGuest>(
            &manager_, std::make_unique<ModelSourceGuest>(&world_, &source_, fails, -1)));
    ASSERT_TRUE(session.ok()) << session.status();
    session_ = *std::move(session);
    ASSERT_TRUE(AwaitState(SessionState::kSyncing));
    StartWriting();
  }

  absl::Status Announce() {
    return service_->AnnounceLaunch("g1", MonotonicNow() + absl::Seconds(10));
  }
  std::vector<absl::Status> own_launches() {
    MutexLock lock(&mutex_);
    return own_launches_;
  }

  Manager manager_;
  Mutex mutex_;
  std::vector<absl::Status> own_launches_ ABSL_GUARDED_BY(mutex_);
};

TEST_F(ManagedSession, TheManagerMovesIt) {
  Start();
  ASSERT_TRUE(Announce().ok());
  EXPECT_TRUE(manager_.expected);
  manager_.begun = true;
  ASSERT_TRUE(AwaitState(SessionState::kMoved));
  EXPECT_TRUE(world_.target_running());
  EXPECT_THAT(Differences(), ::testing::IsEmpty());
  ASSERT_TRUE(Await([&] { return own_launches().size() == 1; }));
  EXPECT_TRUE(own_launches()[0].ok()) << own_launches()[0];
  EXPECT_EQ(manager_.orders, 0);
}

TEST_F(ManagedSession, AnOrderIsTheManagersToCarryOut) {
  Start();
  std::thread manager([&] {
    EXPECT_TRUE(Await([&] { return manager_.orders == 1; }));
    EXPECT_TRUE(Announce().ok());
    manager_.begun = true;
  });
  const absl::StatusOr<HandoverReport> report = Launch();
  manager.join();
  ASSERT_TRUE(report.ok()) << report.status();
  EXPECT_EQ(report->pages_differing, 0u);
  EXPECT_TRUE(report->managed);
  EXPECT_THAT(Differences(), ::testing::IsEmpty());
  EXPECT_THAT(own_launches(), ::testing::IsEmpty()) << "it was ordered";
}

TEST_F(ManagedSession, AnOrderThatTheManagerRefusesEndsWithItsWords) {
  Start();
  {
    MutexLock lock(&manager_.mutex);
    manager_.order_end = absl::FailedPreconditionError("the disks are not shared");
  }
  const absl::StatusOr<HandoverReport> report = Launch();
  EXPECT_THAT(std::string(report.status().message()), HasSubstr("not shared"));
  EXPECT_FALSE(manager_.expected);
  ExpectUnharmed();
  EXPECT_EQ(session_->status().state, SessionState::kSyncing);
}

TEST_F(ManagedSession, NobodyWasToldSoNothingIsTakenUp) {
  Start();
  manager_.begun = true;
  absl::SleepFor(absl::Milliseconds(50));
  EXPECT_EQ(session_->status().state, SessionState::kSyncing);
  ExpectUnharmed();
}

TEST_F(ManagedSession, WhatIsCalledOffOnTheTargetIsForgottenHere) {
  Start();
  ASSERT_TRUE(Announce().ok());
  service_->RetractLaunch("g1", "its QEMU has ended");
  EXPECT_TRUE(Await([&] { return !manager_.expected; }));
  ExpectUnharmed();
  // And a link that is lost.
  ASSERT_TRUE(Announce().ok());
  EXPECT_TRUE(manager_.expected);
  service_->CloseConnections();
  EXPECT_TRUE(Await([&] { return !manager_.expected; }));
}

TEST_F(ManagedSession, AFailureLeavesItHereAndALaterLaunchWorks) {
  host_.set_fails("await-loaded");
  Start();
  ASSERT_TRUE(Announce().ok());
  manager_.begun = true;
  ASSERT_TRUE(Await([&] { return own_launches().size() == 1; }));
  EXPECT_FALSE(own_launches()[0].ok());
  ExpectUnharmed();
  EXPECT_FALSE(manager_.expected) << "its memory would be missing in what the manager saves next";

  host_.set_fails("");
  ASSERT_TRUE(AwaitSyncingAtRest());
  ASSERT_TRUE(Announce().ok());
  manager_.begun = true;
  ASSERT_TRUE(AwaitState(SessionState::kMoved));
  EXPECT_THAT(Differences(), ::testing::IsEmpty());
}

TEST_F(ManagedSession, AGuestThatItsManagerLetGoOnIsNotGivenUp) {
  Start();
  manager_.goes_on = true;
  ASSERT_TRUE(Announce().ok());
  manager_.begun = true;
  ASSERT_TRUE(Await([&] { return own_launches().size() == 1; }));
  EXPECT_THAT(std::string(own_launches()[0].message()), HasSubstr("let it go on"));
  ExpectUnharmed();
}

TEST_F(ManagedSession, InDoubtItIsHeldStillWhateverItsManagerThinks) {
  host_.set_fails("run-unanswered");
  Start();
  ASSERT_TRUE(Announce().ok());
  manager_.begun = true;
  ASSERT_TRUE(AwaitState(SessionState::kInDoubt));
  EXPECT_TRUE(Await([&] { return manager_.held_still > 0; }));
  EXPECT_FALSE(world_.source_running());
}

TEST_F(ManagedSession, NoSourceIsNoAnswer) {
  EXPECT_TRUE(absl::IsUnavailable(Announce()));
  Start();
  EXPECT_TRUE(
      absl::IsUnavailable(service_->AnnounceLaunch("another", MonotonicNow() + absl::Seconds(1))));
}

// A host without libvirt says what it lacks.
TEST_F(SessionTest, ADomainIsRefusedWhereThereIsNoLibvirt) {
  source_options_.domain = "6d1e3a52-7c0b-4f55-9b0a-0a5e5f1c2d3e";
  EXPECT_THAT(std::string(StartSession().message()), HasSubstr("[libvirt]"));
  source_options_.domain = "../../etc";
  EXPECT_TRUE(absl::IsInvalidArgument(StartSession()));
}

}  // namespace
}  // namespace presync
