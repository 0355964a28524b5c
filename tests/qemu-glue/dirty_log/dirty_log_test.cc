// One suite over both userfaultfd logs, against a child process that stands in for QEMU.
#include "transport/dirty_log.h"

#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <memory>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "qemu-glue/dirty_log/glue_client.h"
#include "qemu-glue/dirty_log/probe.h"
#include "qemu-glue/plugin/kernel_abi.h"
#include "tests/qemu-glue/dirty_log/guest_fixture.h"
#include "transport/clock.h"

namespace presync {

void PrintTo(const PageRun& run, std::ostream* os) { *os << run.first << "+" << run.count; }

namespace {

using ::testing::ElementsAre;
using testing::GuestRegionSpec;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using testing::SyntheticGuest;

using Runs = std::vector<PageRun>;

class DirtyLogTest : public ::testing::TestWithParam<DirtyLogMode> {
 protected:
  void StartGuest(const std::vector<GuestRegionSpec>& specs) {
    guest_ = std::make_unique<SyntheticGuest>(specs);
  }

  // Why this mode can't work on this host, whatever the code does; empty if it should.
  std::string MissingHere() {
    const auto client = GlueClient::Connect(guest_->socket(), guest_->process(),
                                            MonotonicNow() + absl::Seconds(10));
    if (!client.ok()) return "";
    const bool async = GetParam() == DirtyLogMode::kUffdAsync;
    const uint64_t needed = async ? UFFD_FEATURE_WP_ASYNC : UFFD_FEATURE_WP_HUGETLBFS_SHMEM;
    if ((client->features() & needed) == 0) return "the kernel's userfaultfd lacks this mode";
    if (!async && ::geteuid() != 0) return "uffd-handler needs root, to open /dev/userfaultfd";
    return "";
  }

  absl::StatusOr<ProbedLog> Probe() {
    ProbeOptions options;
    options.glue_socket = guest_->socket();
    options.qemu = guest_->process();
    options.regions = guest_->regions();
    options.mode = GetParam();
    return ProbeDirtyLog(options);
  }

  void MakeLog() {
    auto probed = Probe();
    ASSERT_TRUE(probed.ok()) << probed.status();
    log_ = std::move(probed->log);
  }

  Runs Peek() {
    Runs runs;
    const absl::Status status = log_->Peek(&runs);
    EXPECT_TRUE(status.ok()) << status;
    return runs;
  }

  void Arm(Runs runs) {
    const absl::Status status = log_->Arm(runs);
    ASSERT_TRUE(status.ok()) << status;
  }

  void ArmAll() {
    Runs all;
    for (const RegionFile& region : guest_->regions()) all.push_back(region.run);
    Arm(all);
  }

  std::unique_ptr<SyntheticGuest> guest_;
  std::unique_ptr<DirtyLog> log_;
};

#define START_OR_SKIP(...)                                                                  \
  StartGuest(__VA_ARGS__);                                                                  \
  if (const std::string missing = MissingHere(); !missing.empty()) GTEST_SKIP() << missing; \
  MakeLog();                                                                                \
  if (log_ == nullptr) return

TEST_P(DirtyLogTest, NothingArmedNothingReported) {
  START_OR_SKIP({{64}});
  EXPECT_THAT(Peek(), IsEmpty());
  ASSERT_EQ(guest_->Do(GUEST_STORE, 0, 0, 64), 0);
  EXPECT_THAT(Peek(), IsEmpty());
}

TEST_P(DirtyLogTest, AWrittenPageIsReportedOnceUntilArmedAgain) {
  START_OR_SKIP({{64}});
  Arm({{3, 4}});
  EXPECT_THAT(Peek(), IsEmpty());
  ASSERT_EQ(guest_->Do(GUEST_STORE, 0, 4, 2), 0);
  EXPECT_THAT(Peek(), ElementsAre(PageRun{4, 2}));
  ASSERT_EQ(guest_->Do(GUEST_STORE, 0, 4, 2), 0);
  EXPECT_THAT(Peek(), IsEmpty());
  Arm({{5, 1}});
  ASSERT_EQ(guest_->Do(GUEST_STORE, 0, 0, 64), 0);
  EXPECT_THAT(Peek(), ElementsAre(PageRun{3, 1}, PageRun{5, 2}));
}

TEST_P(DirtyLogTest, ArmingForgetsEarlierWrites) {
  START_OR_SKIP({{64}});
  Arm({{0, 64}});
  ASSERT_EQ(guest_->Do(GUEST_STORE, 0, 10, 1), 0);
  Arm({{10, 1}});
  EXPECT_THAT(Peek(), IsEmpty());
  ASSERT_EQ(guest_->Do(GUEST_STORE, 0, 10, 1), 0);
  EXPECT_THAT(Peek(), ElementsAre(PageRun{10, 1}));
}

TEST_P(DirtyLogTest, PeekAppends) {
  START_OR_SKIP({{64}});
  ArmAll();
  ASSERT_EQ(guest_->Do(GUEST_STORE, 0, 1, 1), 0);
  Runs runs = {{0, 1}};
  ASSERT_TRUE(log_->Peek(&runs).ok());
  EXPECT_THAT(runs, ElementsAre(PageRun{0, 1}, PageRun{1, 1}));
}

TEST_P(DirtyLogTest, RunsEndAtRegionBorders) {
  START_OR_SKIP({{70}, {30}, {64}});
  ArmAll();
  ASSERT_EQ(guest_->Do(GUEST_STORE, 0, 60, 10), 0);
  ASSERT_EQ(guest_->Do(GUEST_STORE, 1, 0, 30), 0);
  ASSERT_EQ(guest_->Do(GUEST_STORE, 2, 0, 1), 0);
  ASSERT_EQ(guest_->Do(GUEST_STORE, 2, 63, 1), 0);
  EXPECT_THAT(Peek(),
              ElementsAre(PageRun{60, 10}, PageRun{70, 30}, PageRun{100, 1}, PageRun{163, 1}));
}

TEST_P(DirtyLogTest, ARegionMappedInTwoPiecesIsOneRegion) {
  START_OR_SKIP({{10}, {64, true}});
  ArmAll();
  ASSERT_EQ(guest_->Do(GUEST_STORE, 0, 9, 1), 0);
  ASSERT_EQ(guest_->Do(GUEST_STORE, 1, 0, 1), 0);
  ASSERT_EQ(guest_->Do(GUEST_STORE, 1, 30, 4), 0);
  EXPECT_THAT(Peek(), ElementsAre(PageRun{9, 1}, PageRun{10, 1}, PageRun{40, 4}));
  Arm({{40, 4}});
  ASSERT_EQ(guest_->Do(GUEST_STORE, 1, 31, 2), 0);
  EXPECT_THAT(Peek(), ElementsAre(PageRun{41, 2}));
}

TEST_P(DirtyLogTest, BadRunsAreRefused) {
  START_OR_SKIP({{64}, {64}});
  for (const PageRun run : {PageRun{0, 0}, PageRun{127, 2}, PageRun{128, 1}, PageRun{60, 10},
                            PageRun{1, UINT32_MAX}, PageRun{UINT32_MAX, 1}}) {
    EXPECT_EQ(log_->Arm({run}).code(), absl::StatusCode::kInvalidArgument)
        << run.first << "+" << run.count;
  }
}

TEST_P(DirtyLogTest, WritesOfTheKernelAreSeen) {
  START_OR_SKIP({{64}});
  ArmAll();
  ASSERT_EQ(guest_->Do(GUEST_READ_INTO, 0, 5, 2), 0);
  ASSERT_EQ(guest_->Do(GUEST_VM_WRITE, 0, 20, 1), 0);
  EXPECT_THAT(Peek(), ElementsAre(PageRun{5, 2}, PageRun{20, 1}));
}

TEST_P(DirtyLogTest, PagesWithoutMemoryAreWatchedToo) {
  START_OR_SKIP({{4096}});  // nothing was ever written: no page tables either
  ArmAll();
  EXPECT_THAT(Peek(), IsEmpty());
  ASSERT_EQ(guest_->Do(GUEST_STORE, 0, 4000, 1), 0);
  ASSERT_EQ(guest_->Do(GUEST_READ_INTO, 0, 7, 1), 0);
  EXPECT_THAT(Peek(), ElementsAre(PageRun{7, 1}, PageRun{4000, 1}));
}

TEST_P(DirtyLogTest, MoreRunsThanOneScanReturns) {
  constexpr PageCount kPages = 20000;
  START_OR_SKIP({{kPages}});
  ArmAll();
  Runs expected;
  for (PageIndex page = 1; page < kPages; page += 2) {
    guest_->Send(GUEST_STORE, 0, page, 1);
    ASSERT_EQ(guest_->Answer(), 0);
    expected.push_back({page, 1});
  }
  EXPECT_EQ(Peek(), expected);
  EXPECT_THAT(Peek(), IsEmpty());
}

TEST_P(DirtyLogTest, AgreesWithAReferenceSet) {
  const auto seed = std::random_device()();
  SCOPED_TRACE(::testing::Message() << "seed " << seed);
  START_OR_SKIP({{700}, {333, true}});
  std::mt19937 random(seed);
  std::set<PageIndex> armed, written;
  for (int step = 0; step < 400; ++step) {
    const size_t r = random() % 2;
    const PageRun region = guest_->regions()[r].run;
    const PageIndex first = random() % region.count;
    const PageCount count = 1 + random() % std::min<PageCount>(40, region.count - first);
    switch (random() % 3) {
      case 0:
        Arm({{region.first + first, count}});
        for (PageIndex p = region.first + first; p < region.first + first + count; ++p) {
          armed.insert(p);
          written.erase(p);
        }
        break;
      case 1: {
        const guest_op ops[] = {GUEST_STORE, GUEST_READ_INTO, GUEST_VM_WRITE};
        ASSERT_EQ(guest_->Do(ops[random() % 3], static_cast<uint32_t>(r), first, count), 0);
        for (PageIndex p = region.first + first; p < region.first + first + count; ++p) {
          if (armed.count(p) > 0) written.insert(p);
        }
        break;
      }
      default: {
        Runs expected;
        for (const PageIndex p : written) {
          armed.erase(p);
          if (!expected.empty() && expected.back().end() == p && p != 700) {
            ++expected.back().count;
          } else {
            expected.push_back({p, 1});
          }
        }
        written.clear();
        ASSERT_EQ(Peek(), expected) << "step " << step;
      }
    }
  }
}

// The promise that all else rests on: arm, then read; what changes after that is reported.
TEST_P(DirtyLogTest, NoConcurrentWriteIsLost) {
  const auto seed = std::random_device()();
  SCOPED_TRACE(::testing::Message() << "seed " << seed);
  START_OR_SKIP({{48}, {16}});  // few pages: faults and arming meet on the same ones
  std::vector<std::byte> copy(PagesToBytes(guest_->pages()));
  const auto copy_run = [&](PageRun run) {
    for (PageIndex p = run.first; p < run.end(); ++p) {
      std::memcpy(copy.data() + PagesToBytes(p), guest_->Page(p), kPageBytes);
    }
  };
  ArmAll();
  for (const RegionFile& region : guest_->regions()) copy_run(region.run);
  const absl::Time deadline = MonotonicNow() + absl::Seconds(120);
  for (int round = 0; round < 20; ++round) {
    ASSERT_EQ(guest_->Do(GUEST_START_WRITERS, 0, 0, 0, seed + round), 0);
    for (uint64_t seen = 0; seen < 1000;) {
      ASSERT_LT(MonotonicNow(), deadline) << "the writers make no progress";
      for (const PageRun& run : Peek()) {
        Arm({run});
        copy_run(run);
        seen += run.count;
      }
    }
    ASSERT_EQ(guest_->Do(GUEST_STOP_WRITERS), 0);
    std::set<PageIndex> reported;
    for (const PageRun& run : Peek()) {
      for (PageIndex p = run.first; p < run.end(); ++p) reported.insert(p);
    }
    for (PageIndex p = 0; p < guest_->pages(); ++p) {
      if (reported.count(p) > 0) continue;
      ASSERT_EQ(std::memcmp(copy.data() + PagesToBytes(p), guest_->Page(p), kPageBytes), 0)
          << "page " << p << " changed unseen in round " << round;
    }
    for (const PageIndex p : reported) {
      Arm({{p, 1}});
      copy_run({p, 1});
    }
  }
}

TEST_P(DirtyLogTest, GuestRunsOnWithoutUsAndANewClientResumes) {
  START_OR_SKIP({{64}, {64}});
  ArmAll();
  log_.reset();
  ASSERT_EQ(guest_->Do(GUEST_STORE, 0, 0, 32), 0) << "a write must not wait for a client";
  ASSERT_EQ(guest_->Do(GUEST_READ_INTO, 1, 0, 32), 0);
  MakeLog();
  ASSERT_NE(log_, nullptr);
  EXPECT_THAT(Peek(), IsEmpty()) << "at first no page is armed";
  ArmAll();
  ASSERT_EQ(guest_->Do(GUEST_STORE, 1, 40, 2), 0);
  EXPECT_THAT(Peek(), ElementsAre(PageRun{104, 2}));
}

TEST_P(DirtyLogTest, StopTrackingMakesRoomForOthers) {
  START_OR_SKIP({{64}, {64, true}});
  ArmAll();
  log_.reset();
  EXPECT_EQ(guest_->Do(GUEST_REGISTER_OTHER), EBUSY);
  const absl::Time deadline = MonotonicNow() + absl::Seconds(20);
  const absl::Status stopped =
      StopTracking(guest_->socket(), guest_->process(), guest_->regions(), deadline);
  ASSERT_TRUE(stopped.ok()) << stopped;
  EXPECT_TRUE(StopTracking(guest_->socket(), guest_->process(), guest_->regions(), deadline).ok())
      << "twice is fine";
  EXPECT_EQ(guest_->Do(GUEST_REGISTER_OTHER), 0);
}

TEST_P(DirtyLogTest, AnotherClientIsToldSo) {
  START_OR_SKIP({{64}});
  const auto second = Probe();
  EXPECT_EQ(second.status().code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_THAT(second.status().message(), HasSubstr("another presyncd is connected"));
  ArmAll();
  ASSERT_EQ(guest_->Do(GUEST_STORE, 0, 1, 1), 0);
  EXPECT_THAT(Peek(), ElementsAre(PageRun{1, 1}));
}

TEST_P(DirtyLogTest, GuestKilled) {
  START_OR_SKIP({{64}});
  ArmAll();
  guest_->Kill();
  Runs runs;
  EXPECT_EQ(log_->Peek(&runs).code(), absl::StatusCode::kUnavailable);
  EXPECT_THAT(runs, IsEmpty());
  EXPECT_EQ(log_->Arm({{0, 1}}).code(), absl::StatusCode::kUnavailable);
  const auto again = Probe();
  EXPECT_EQ(again.status().code(), absl::StatusCode::kNotFound) << again.status();
}

TEST_P(DirtyLogTest, MemoryUnmappedByTheGuest) {
  START_OR_SKIP({{64}});
  ArmAll();
  ASSERT_EQ(guest_->Do(GUEST_UNMAP), 0);
  EXPECT_EQ(log_->Arm({{0, 1}}).code(), absl::StatusCode::kUnavailable);
  if (GetParam() == DirtyLogMode::kUffdAsync) {
    Runs runs;
    EXPECT_EQ(log_->Peek(&runs).code(), absl::StatusCode::kUnavailable);
  }
}

TEST_P(DirtyLogTest, AnotherUserfaultfdIsInTheWay) {
  StartGuest({{64}});
  if (const std::string missing = MissingHere(); !missing.empty()) GTEST_SKIP() << missing;
  ASSERT_EQ(guest_->Do(GUEST_REGISTER_OTHER), 0);
  const auto probed = Probe();
  EXPECT_EQ(probed.status().code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_THAT(probed.status().message(), HasSubstr("EBUSY: another userfaultfd"));
}

TEST_P(DirtyLogTest, MemoryMappedTwiceIsRefused) {
  StartGuest({{64}});
  if (const std::string missing = MissingHere(); !missing.empty()) GTEST_SKIP() << missing;
  ASSERT_EQ(guest_->Do(GUEST_MAP_AGAIN), 0);
  const auto probed = Probe();
  EXPECT_EQ(probed.status().code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_THAT(probed.status().message(), HasSubstr("mapped twice"));
}

INSTANTIATE_TEST_SUITE_P(Logs, DirtyLogTest,
                         ::testing::Values(DirtyLogMode::kUffdAsync, DirtyLogMode::kUffdHandler),
                         [](const auto& p) {
                           return p.param == DirtyLogMode::kUffdAsync ? "Async" : "Handler";
                         });

}  // namespace
}  // namespace presync
