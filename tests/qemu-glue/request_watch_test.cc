// What a look makes of QEMU's accounts, from a monitor with a script.
#include "qemu-glue/request_watch.h"

#include <gtest/gtest.h>

#include <memory>
#include <string>
#include <vector>

#include "tests/qemu-glue/fake_qmp_server.h"
#include "transport/clock.h"

namespace presync {
namespace {

constexpr uint64_t kMs = 1'000'000;

class RequestWatchTest : public ::testing::Test {
 protected:
  RequestWatchTest() {
    absl::StatusOr<std::unique_ptr<QmpClient>> qmp =
        QmpClient::Connect(server_.path(), MonotonicNow() + absl::Seconds(60));
    EXPECT_TRUE(qmp.ok()) << qmp.status();
    qmp_ = *std::move(qmp);
  }

  absl::Duration Look() {
    const absl::StatusOr<RequestLook> look = watch_.Look(*qmp_, MonotonicNow() + absl::Seconds(60));
    EXPECT_TRUE(look.ok()) << look.status();
    return look.ok() ? look->longest : absl::ZeroDuration();
  }

  Json Answer(const std::string& command, const Json& arguments) {
    if (command == "query-blockstats") return blockstats_;
    if (command == "qom-get") return type_;
    if (command == "block-latency-histogram-set") {
      histograms_.push_back(arguments);
      return Json::object();
    }
    return nullptr;
  }

  static Json Disk(const std::string& id, uint64_t total_ns) {
    return {
        {"qdev", id},
        {"stats",
         {{"rd_total_time_ns", total_ns}, {"failed_rd_operations", 0}, {"account_failed", true}}}};
  }
  static Json WithHistogram(Json disk, std::vector<uint64_t> bins) {
    disk["stats"]["rd_latency_histogram"] = {{"boundaries", {10 * kMs, 100 * kMs, 1000 * kMs}},
                                             {"bins", bins}};
    return disk;
  }

  // Touched by the server's thread between a command and its answer only.
  Json blockstats_ = Json::array();
  Json type_ = "scsi-hd";
  std::vector<Json> histograms_;
  FakeQmpServer server_{AnswerEach([this](const std::string& command, const Json& arguments) {
    return Answer(command, arguments);
  })};
  std::unique_ptr<QmpClient> qmp_;
  RequestWatch watch_;
};

TEST_F(RequestWatchTest, TheFirstLookKnowsNothingTheNextTheStep) {
  blockstats_ = Json::array({Disk("a", 500 * kMs)});
  EXPECT_EQ(Look(), absl::InfiniteDuration());
  blockstats_ = Json::array({Disk("a", 530 * kMs)});
  EXPECT_EQ(Look(), absl::Milliseconds(30));
  EXPECT_EQ(Look(), absl::ZeroDuration());
}

TEST_F(RequestWatchTest, AHistogramBoundsManyReadsCloser) {
  blockstats_ = Json::array({WithHistogram(Disk("a", 0), {0, 0, 0, 0})});
  Look();
  blockstats_ = Json::array({WithHistogram(Disk("a", 9000 * kMs), {0, 300, 0, 0})});
  EXPECT_EQ(Look(), absl::Milliseconds(100));
  blockstats_ = Json::array({WithHistogram(Disk("a", 9500 * kMs), {0, 300, 0, 1})});
  EXPECT_EQ(Look(), absl::Milliseconds(500)) << "the last bin has no bound, the sum has";
}

TEST_F(RequestWatchTest, AHistogramThatHasJustBegunIsWaitedFor) {
  blockstats_ = Json::array({Disk("a", 0)});
  Look();
  blockstats_ = Json::array({WithHistogram(Disk("a", 9000 * kMs), {0, 300, 0, 0})});
  EXPECT_EQ(Look(), absl::InfiniteDuration());
  EXPECT_EQ(Look(), absl::ZeroDuration());
}

TEST_F(RequestWatchTest, QemuKeepsAHistogramWhereThereIsNoneAndDropsItInTheEnd) {
  blockstats_ = Json::array({Disk("a", 0), WithHistogram(Disk("b", 0), {0, 0, 0, 0})});
  Look();
  Look();
  ASSERT_EQ(histograms_.size(), 1u);
  EXPECT_EQ(StringAt(histograms_[0], "id"), "a");
  watch_.Undo(*qmp_);
  Look();  // so that what was posted has been read
  ASSERT_GE(histograms_.size(), 2u);
  EXPECT_EQ(histograms_[1], Json({{"id", "a"}}));
}

TEST_F(RequestWatchTest, ADeviceThatLeftTookItsAccountsAlong) {
  blockstats_ = Json::array({Disk("a", 0), Disk("b", 0)});
  Look();
  EXPECT_EQ(Look(), absl::ZeroDuration());
  blockstats_ = Json::array({Disk("a", 0)});
  EXPECT_EQ(Look(), absl::InfiniteDuration());
  EXPECT_EQ(Look(), absl::ZeroDuration());
}

TEST_F(RequestWatchTest, ADeviceThatCameHasCountedAllItsReads) {
  blockstats_ = Json::array({Disk("a", 0)});
  Look();
  blockstats_ = Json::array({Disk("a", 0), Disk("b", 70 * kMs)});
  EXPECT_EQ(Look(), absl::Milliseconds(70));
}

TEST_F(RequestWatchTest, ScsiGenericKeepsNoAccounts) {
  type_ = "scsi-generic";
  blockstats_ = Json::array({Disk("a", 0)});
  Look();
  EXPECT_EQ(Look(), absl::InfiniteDuration());
}

TEST_F(RequestWatchTest, AReadThatFailedUncountedIsUnknown) {
  blockstats_ = Json::array({Disk("a", 0)});
  blockstats_[0]["stats"]["account_failed"] = false;
  Look();
  EXPECT_EQ(Look(), absl::ZeroDuration());
  blockstats_[0]["stats"]["failed_rd_operations"] = 1;
  EXPECT_EQ(Look(), absl::InfiniteDuration());
}

TEST_F(RequestWatchTest, WhatNoDeviceUsesDoesNotCount) {
  blockstats_ = Json::array({{{"device", "backup0"}, {"stats", Json::object()}}});
  Look();
  EXPECT_EQ(Look(), absl::ZeroDuration());
}

TEST_F(RequestWatchTest, AnswersOfTheWrongShapeAreErrors) {
  for (const Json& answer :
       {Json("?"), Json({{"a", 1}}),
        Json::array({{{"qdev", "a"}, {"stats", {{"rd_total_time_ns", -1}}}}})}) {
    blockstats_ = answer;
    EXPECT_FALSE(watch_.Look(*qmp_, MonotonicNow() + absl::Seconds(60)).ok()) << answer;
  }
}

}  // namespace
}  // namespace presync
