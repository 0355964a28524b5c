// The contract for the fake, and what its scripts do.
#include "transport/fake/fake_link.h"

#include "tests/transport/link_contract.h"
#include "transport/fake/simulated_clock.h"

namespace presync {
namespace {

FakeLinkOptions Simulated(uint64_t seed) {
  auto clock = std::make_shared<SimulatedClock>();
  FakeLinkOptions options;
  options.seed = seed;
  options.now = [clock] { return clock->Now(); };
  options.wait_until = [clock](absl::Time until) { clock->AdvanceTo(until); };
  options.max_in_flight_bytes = uint64_t{1} << 20;
  return options;
}

LinkKind Kind(std::string name, FakeLinkOptions (*adjust)(FakeLinkOptions)) {
  return {std::move(name), [adjust](const GuestMemory& source, const GuestMemory& target) {
            const FakeLinkOptions options = adjust(Simulated(std::random_device()()));
            absl::StatusOr<LinkPair> pair;
            auto link = FakeLink::Create(&source, &target, options);
            if (!link.ok()) {
              pair = link.status();
              return pair;
            }
            pair = LinkPair{std::move(link->source), std::move(link->target), options.now};
            return pair;
          }};
}

INSTANTIATE_TEST_SUITE_P(Fake, LinkContract,
                         ::testing::Values(Kind("plain",
                                                [](FakeLinkOptions options) { return options; }),
                                           Kind("short_posts",
                                                [](FakeLinkOptions options) {
                                                  options.short_post_probability = 0.5;
                                                  return options;
                                                }),
                                           Kind("slow",
                                                [](FakeLinkOptions options) {
                                                  options.latency = absl::Milliseconds(20);
                                                  options.jitter = absl::Milliseconds(50);
                                                  options.bytes_per_s = 50'000'000;
                                                  return options;
                                                })),
                         [](const auto& kind) { return kind.param.name; });

class FakeLinkTest : public ::testing::Test {
 protected:
  static constexpr PageCount kPages = 64;
  void SetUp() override {
    source_ = *ScratchMemory::Create({kPages});
    target_ = *ScratchMemory::Create({kPages});
    for (PageIndex page = 0; page < kPages; ++page) source_->FillPage(page, 1);
  }
  FakeLink Connect(FakeLinkOptions options) {
    options_ = std::move(options);
    return *FakeLink::Create(&source_->memory(), &target_->memory(), options_);
  }
  static std::vector<PageWrite> Page(PageIndex page) { return {{{page, 1}}}; }

  std::unique_ptr<ScratchMemory> source_, target_;
  FakeLinkOptions options_;
};

TEST_F(FakeLinkTest, CatchesWhoTrustsACompletion) {
  FakeLink link = Connect(Simulated(1));
  const std::vector<PageWrite> all = {{{0, kPages}}};
  ASSERT_EQ(*link.source->Post(all), 1u);
  LinkEvents events;
  while (events.completed.empty()) {
    ASSERT_TRUE(link.source->Wait(absl::InfiniteFuture()).ok());
    ASSERT_TRUE(link.source->Poll(&events).ok());
  }
  EXPECT_FALSE(source_->Differences(*target_).empty());
}

TEST_F(FakeLinkTest, CatchesAPageThatIsPostedTwice) {
  FakeLink link = Connect(Simulated(1));
  ASSERT_EQ(*link.source->Post(Page(1)), 1u);
  EXPECT_EQ(link.source->Post(Page(1)).status().code(), absl::StatusCode::kInternal);
}

TEST_F(FakeLinkTest, FailsTheScriptedCallsForGood) {
  FakeLinkOptions options = Simulated(1);
  options.faults.fail_post = 2;
  FakeLink post = Connect(options);
  EXPECT_TRUE(post.source->Post(Page(1)).ok());
  EXPECT_EQ(post.source->Post(Page(2)).status().code(), absl::StatusCode::kUnavailable);
  EXPECT_EQ(post.source->PostCommit().status().code(), absl::StatusCode::kUnavailable);
  EXPECT_EQ(post.target->health().code(), absl::StatusCode::kUnavailable);

  options = Simulated(1);
  options.faults.fail_poll = 3;
  FakeLink poll = Connect(options);
  LinkEvents events;
  EXPECT_TRUE(poll.source->Poll(&events).ok());
  EXPECT_TRUE(poll.source->Poll(&events).ok());
  EXPECT_EQ(poll.source->Poll(&events).code(), absl::StatusCode::kUnavailable);

  options = Simulated(1);
  options.faults.fail_commit = 1;
  FakeLink commit = Connect(options);
  EXPECT_EQ(commit.source->PostCommit().status().code(), absl::StatusCode::kUnavailable);
}

TEST_F(FakeLinkTest, DropsWithWhatWasInFlightHalfArrived) {
  FakeLinkOptions options = Simulated(3);
  options.faults.drop_after_writes = kPages;
  FakeLink link = Connect(options);
  std::vector<PageWrite> writes;
  for (PageIndex page = 0; page < kPages; ++page) writes.push_back({{page, 1}});
  EXPECT_EQ(link.source->Post(writes).status().code(), absl::StatusCode::kUnavailable);
  const size_t missing = source_->Differences(*target_).size();
  EXPECT_GT(missing, 0u);
  EXPECT_LT(missing, kPages);
}

TEST_F(FakeLinkTest, RunsAtItsRateAndAtTheLowerPacing) {
  FakeLinkOptions options = Simulated(1);
  options.bytes_per_s = 40'000'000;
  for (const uint64_t pacing : {uint64_t{0}, uint64_t{10'000'000}}) {
    FakeLink link = Connect(options);
    link.source->SetPacing(pacing);
    const absl::Time start = options.now();
    const std::vector<PageWrite> all = {{{0, kPages}}};
    ASSERT_EQ(*link.source->Post(all), 1u);
    LinkEvents events;
    while (events.completed.empty()) {
      ASSERT_TRUE(link.source->Wait(absl::InfiniteFuture()).ok());
      ASSERT_TRUE(link.source->Poll(&events).ok());
    }
    const double seconds = absl::ToDoubleSeconds(options.now() - start);
    const double rate = pacing == 0 ? 40e6 : 10e6;
    EXPECT_NEAR(seconds, PagesToBytes(kPages) / rate, 150e-6) << pacing;
  }
}

TEST_F(FakeLinkTest, TheSameSeedDoesTheSame) {
  std::vector<std::vector<PageIndex>> outcomes;
  for (const uint64_t seed : {7, 7, 8}) {
    for (PageIndex page = 0; page < kPages; ++page) target_->ZeroPage(page);
    FakeLinkOptions options = Simulated(seed);
    options.faults.drop_after_writes = 1;
    FakeLink link = Connect(options);
    EXPECT_FALSE(link.source->Post(std::vector<PageWrite>{{{0, kPages}}}).ok());
    outcomes.push_back(source_->Differences(*target_));
  }
  EXPECT_EQ(outcomes[0], outcomes[1]);
  EXPECT_NE(outcomes[0], outcomes[2]);
}

}  // namespace
}  // namespace presync
