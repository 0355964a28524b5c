// The measuring loop over the fake link, and server and client of a benchmark together over TCP.
#include "tools/bench/link_bench.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <memory>
#include <set>
#include <vector>

#include "tools/bench/bench_target_host.h"
#include "transport/clock.h"
#include "transport/sync/source_connection.h"
#include "transport/sync/target_service.h"
#include "transport/tcp/socket.h"

namespace presync {
namespace {

using ::testing::HasSubstr;

constexpr uint64_t kMemoryBytes = 8 << 20;

// Takes a few messages at a time, completes them at the next Poll, and checks what it is given.
class StrictLink final : public SourceLink {
 public:
  std::string_view name() const override { return "strict"; }
  absl::StatusOr<size_t> Post(absl::Span<const PageWrite> writes) override {
    const size_t taken = std::min<size_t>(writes.size(), 3);
    for (const PageWrite& write : writes.first(taken)) {
      for (PageIndex page = write.run.first; page < write.run.end(); ++page) {
        EXPECT_TRUE(under_way_.insert(page).second) << "page " << page << " is under way already";
      }
      if (!posted_.empty()) touches_ += posted_.back().run.end() == write.run.first ? 1 : 0;
      posted_.push_back(write);
      ++count_;
      most_ = std::max(most_, ++outstanding_);
    }
    return taken;
  }
  absl::StatusOr<CommitId> PostCommit() override { return ++commits_; }
  absl::Status Poll(LinkEvents* events) override {
    if (dead_) return absl::UnavailableError("the link is gone");
    for (const PageWrite& write : posted_) {
      for (PageIndex p = write.run.first; p < write.run.end(); ++p) under_way_.erase(p);
      events->completed.push_back(write);
    }
    posted_.clear();
    outstanding_ = 0;
    events->committed = commits_;
    return absl::OkStatus();
  }
  absl::Status Wait(absl::Time) override { return absl::OkStatus(); }
  LinkStats stats() const override { return {}; }
  void SetPacing(uint64_t) override {}

  uint64_t count_ = 0, touches_ = 0, outstanding_ = 0, most_ = 0;
  bool dead_ = false;

 private:
  CommitId commits_ = 0;
  std::set<PageIndex> under_way_;
  std::vector<PageWrite> posted_;
};

class LinkBenchTest : public ::testing::Test {
 protected:
  GuestMemory memory_ = *MakeScratchMemory("/dev/shm", kMemoryBytes);
  StrictLink link_;
};

TEST_F(LinkBenchTest, PostsAsManyMessagesAsAskedAndNeverAPageTwiceAtATime) {
  const absl::StatusOr<LinkBenchResult> result =
      MeasureLink(&link_, memory_, {.message_bytes = 64 << 10, .depth = 8, .messages = 1000});
  ASSERT_TRUE(result.ok()) << result.status();
  EXPECT_EQ(result->messages, 1000u);
  EXPECT_EQ(link_.count_, 1000u + 64u) << "a warm-up of 4 MiB goes before";
  EXPECT_LE(link_.most_, 8u);
  EXPECT_GT(result->elapsed, absl::ZeroDuration());
  EXPECT_LE(result->latency_p50, result->latency_p90);
  EXPECT_LE(result->latency_p90, result->latency_p99);
}

TEST_F(LinkBenchTest, ADepthBeyondTheMemoryIsCutAndSaidSo) {
  const absl::StatusOr<LinkBenchResult> result =
      MeasureLink(&link_, memory_, {.message_bytes = 4 << 20, .depth = 128, .messages = 10});
  ASSERT_TRUE(result.ok()) << result.status();
  EXPECT_EQ(result->depth, 2u);
}

TEST_F(LinkBenchTest, ScatteredMessagesNeverTouch) {
  LinkBenchOptions options = {
      .message_bytes = 4096, .pattern = LinkPattern::kScattered, .messages = 5000};
  ASSERT_TRUE(MeasureLink(&link_, memory_, options).ok());
  EXPECT_EQ(link_.touches_, 0u);
  options.pattern = LinkPattern::kContiguous;
  ASSERT_TRUE(MeasureLink(&link_, memory_, options).ok());
  EXPECT_GT(link_.touches_, 0u);
}

TEST_F(LinkBenchTest, RefusesMessagesThatAreNoPages) {
  for (const uint64_t bytes : {uint64_t{0}, uint64_t{4097}, 2 * kMemoryBytes}) {
    EXPECT_EQ(MeasureLink(&link_, memory_, {.message_bytes = bytes}).status().code(),
              absl::StatusCode::kInvalidArgument);
  }
}

TEST_F(LinkBenchTest, ALinkThatDiesIsAnErrorAndNoResult) {
  link_.dead_ = true;
  EXPECT_EQ(MeasureLink(&link_, memory_, {}).status().code(), absl::StatusCode::kUnavailable);
}

class BenchServerTest : public ::testing::Test {
 protected:
  BenchServerTest() : host_("/dev/shm", kMemoryBytes) {
    absl::StatusOr<UniqueFd> listener = Listen("127.0.0.1", 0);
    dialer_ = std::make_unique<TcpDialer>("127.0.0.1", *BoundPort(listener->get()));
    TargetServiceOptions options;
    options.record_folder = records_->path();
    service_ = TargetService::Start(*std::move(listener), &host_, options);
  }

  absl::StatusOr<SourceConnection> Connect(const GuestMemory& memory) {
    SessionRequest request;
    request.session = RandomId();
    request.guest = "bench";
    request.transport = Transport::kTcp;
    return ConnectSource(dialer_.get(), &memory, request, MonotonicNow() + absl::Seconds(20));
  }

  const std::unique_ptr<TemporaryFolder> records_ = *TemporaryFolder::Create();
  BenchTargetHost host_;
  std::unique_ptr<TcpDialer> dialer_;
  std::unique_ptr<TargetService> service_;
};

TEST_F(BenchServerTest, TheProductsLinkCarriesEveryMessage) {
  const GuestMemory memory = *MakeScratchMemory("/dev/shm", kMemoryBytes);
  absl::StatusOr<SourceConnection> connection = Connect(memory);
  ASSERT_TRUE(connection.ok()) << connection.status();
  const uint64_t before = connection->link->stats().payload_bytes;
  const absl::StatusOr<LinkBenchResult> result =
      MeasureLink(connection->link.get(), memory,
                  {.message_bytes = 64 << 10, .pattern = LinkPattern::kScattered, .messages = 300});
  ASSERT_TRUE(result.ok()) << result.status();
  EXPECT_EQ(connection->link->stats().payload_bytes - before, (300u + 64u) << 16);
  EXPECT_GT(result->cpu, absl::ZeroDuration());
}

TEST_F(BenchServerTest, GivesAwayNoMoreThanItHas) {
  const GuestMemory memory = *MakeScratchMemory("/dev/shm", 2 * kMemoryBytes);
  const absl::Status status = Connect(memory).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kResourceExhausted);
  EXPECT_THAT(std::string(status.message()), HasSubstr("--memory"));
}

TEST_F(BenchServerTest, TakesNoHandover) {
  const GuestMemory memory = *MakeScratchMemory("/dev/shm", kMemoryBytes);
  absl::StatusOr<SourceConnection> connection = Connect(memory);
  ASSERT_TRUE(connection.ok()) << connection.status();
  const absl::Time deadline = MonotonicNow() + absl::Seconds(20);
  wire::ControlMessage begin;
  begin.mutable_begin_handover();
  ASSERT_TRUE(connection->channel->Send(begin, deadline).ok());
  absl::StatusOr<wire::ControlMessage> answer = connection->channel->Receive(deadline);
  ASSERT_TRUE(answer.ok()) << answer.status();
  EXPECT_EQ(answer->body_case(), wire::ControlMessage::kRefused);
}

}  // namespace
}  // namespace presync
