#include "tools/presyncd/history.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <string>

#include "absl/strings/str_cat.h"
#include "tools/common/local_api.h"
#include "transport/clock.h"

namespace presync {
namespace {

using ::testing::HasSubstr;

SessionStatus Status(const std::string& guest, absl::Duration uptime) {
  SessionStatus status;
  status.guest = guest;
  status.session = "first";
  status.state = SessionState::kSyncing;
  status.link = "tcp";
  status.peer = "b:7350";
  status.uptime = uptime;
  status.promise = absl::Milliseconds(100);
  return status;
}

class HistoryTest : public ::testing::Test {
 protected:
  nlohmann::json Report(const std::string& guest) {
    absl::StatusOr<nlohmann::json> report = history_.Report(guest);
    EXPECT_TRUE(report.ok()) << report.status();
    return report.ok() ? *report : nlohmann::json::object();
  }

  // One look a second.
  void Sync(SessionStatus status, int64_t seconds) {
    for (int64_t i = 0; i < seconds; ++i) {
      status.uptime = absl::Seconds(i);
      status.progress.wire_bytes = static_cast<uint64_t>(i);
      history_.Sample(status, start_ + absl::Seconds(i));
    }
  }

  const absl::Time start_ = MonotonicNow();
  History history_;
};

TEST_F(HistoryTest, UnknownGuestIsSaid) {
  const absl::StatusOr<nlohmann::json> report = history_.Report("web1");
  EXPECT_TRUE(absl::IsNotFound(report.status()));
  EXPECT_THAT(std::string(report.status().message()), HasSubstr("web1"));
}

TEST_F(HistoryTest, LongSyncStaysBoundedAndWhole) {
  constexpr int64_t kSeconds = 100'000;
  Sync(Status("web1", {}), kSeconds);
  const nlohmann::json samples = Report("web1")["samples"];
  EXPECT_LE(samples.size(), History::kMostSamples);
  EXPECT_GE(samples.size(), History::kMostSamples / 2);
  EXPECT_EQ(samples.front()["t"], 0);
  double last = -1, widest = 0;
  for (const nlohmann::json& sample : samples) {
    EXPECT_GT(sample["t"], last);
    if (last >= 0) widest = std::max(widest, sample["t"].get<double>() - last);
    last = sample["t"];
    EXPECT_EQ(sample["wire_bytes"].get<double>(), last);
  }
  EXPECT_LE(widest, 2.0 * kSeconds / (History::kMostSamples / 2));
  EXPECT_GE(last, kSeconds - 1 - widest);
  EXPECT_LT(Report("web1").dump().size(), kMaxLocalLineBytes) << "must fit into one answer";
}

TEST_F(HistoryTest, ChangesAreNeverThinnedOutWhenSeen) {
  Sync(Status("web1", {}), 10'000);  // one look in many is kept now
  SessionStatus fallen = Status("web1", absl::Seconds(10'000));
  fallen.link = "rdma";
  history_.Sample(fallen, start_ + absl::Seconds(10'000));
  const nlohmann::json report = Report("web1");
  EXPECT_EQ(report["samples"].back()["link"], "rdma");
  EXPECT_EQ(report["samples"].back()["t"], 10'000);
}

TEST_F(HistoryTest, EndedSyncGrowsNoMore) {
  Sync(Status("web1", {}), 5);
  SessionStatus moved = Status("web1", absl::Seconds(5));
  moved.state = SessionState::kMoved;
  for (int i = 5; i < 50; ++i) history_.Sample(moved, start_ + absl::Seconds(i));
  EXPECT_EQ(Report("web1")["samples"].size(), 6);
}

TEST_F(HistoryTest, NewSessionBeginsAfreshAndKeepsLaunches) {
  Sync(Status("web1", {}), 5);
  HandoverReport done;
  done.launch = absl::Milliseconds(80);
  done.steps = {{"rounds", absl::Milliseconds(30)}};
  history_.NoteLaunch(Status("web1", absl::Seconds(5)), start_ + absl::Seconds(5), done);
  SessionStatus again = Status("web1", absl::ZeroDuration());
  again.session = "second";
  history_.Sample(again, start_ + absl::Seconds(100));
  const nlohmann::json report = Report("web1");
  EXPECT_EQ(report["samples"].size(), 1);
  // A date, for people.
  EXPECT_NEAR(report["since"], absl::ToDoubleSeconds(absl::Now() - absl::UnixEpoch()) + 100, 30);
  ASSERT_EQ(report["launches"].size(), 1);
  EXPECT_EQ(report["launches"][0]["launch_ms"], 80);
  EXPECT_EQ(report["launches"][0]["promised_ms"], 100);
  EXPECT_EQ(report["launches"][0]["steps"][0]["step"], "rounds");
}

TEST_F(HistoryTest, FailedLaunchesAreKeptToo) {
  for (size_t i = 0; i < History::kMostLaunches + 3; ++i) {
    history_.NoteLaunch(Status("web1", {}), start_, absl::UnavailableError(absl::StrCat("no ", i)));
  }
  const nlohmann::json launches = Report("web1")["launches"];
  ASSERT_EQ(launches.size(), History::kMostLaunches);
  EXPECT_EQ(launches.back()["error"], absl::StrCat("no ", History::kMostLaunches + 2));
}

TEST_F(HistoryTest, TheGuestSeenLongestAgoMakesRoom) {
  for (size_t i = 0; i <= History::kMostGuests; ++i) {
    history_.Sample(Status(absl::StrCat("g", i), {}), start_ + absl::Seconds(i));
  }
  EXPECT_FALSE(history_.Report("g0").ok());
  EXPECT_TRUE(history_.Report("g1").ok());
}

}  // namespace
}  // namespace presync
