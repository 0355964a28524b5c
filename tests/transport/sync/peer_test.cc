// Who may do what at a target: by certificate, over real sockets on loopback.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <memory>
#include <string>
#include <vector>

#include "tests/transport/sync/session_fixture.h"
#include "tests/transport/tls/certificates.h"
#include "transport/clock.h"
#include "transport/sync/conversation.h"
#include "transport/sync/link_messages.h"
#include "transport/wire/version.h"

namespace presync {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::Not;
using Body = wire::ControlMessage;

class PeerTest : public SessionTest {
 protected:
  PeerTest() {
    target_options_.admission.security = Secure("two");
    target_options_.peers.emplace()["one"] = {};
    target_options_.peers->emplace("elsewhere", PeerRules());
    target_options_.log = [this](bool, const std::string& line) {
      MutexLock lock(&log_mutex_);
      log_.push_back(line);
    };
    Restart();
  }
  ~PeerTest() override {
    session_.reset();
    service_.reset();  // it logs here
  }

  void Restart() {
    service_.reset();
    StartTarget();
  }

  void StartSync() {
    SourceSessionOptions options = source_options_;
    options.guest = "g1";
    options.guest_address = "model";
    options.record_folder = source_folder_.path();
    options.sync.scan_interval = absl::Milliseconds(10);
    options.sync.max_launch_time = options.sync.fixed_cost;
    auto session = SourceSession::Start(
        options, std::make_unique<TcpDialer>("127.0.0.1", port_, Secure("one")), CopyMemory(),
        source_.MakeLog(), std::make_unique<ModelSourceGuest>(&world_, &source_, "", -1));
    ASSERT_TRUE(session.ok()) << session.status();
    session_ = *std::move(session);
  }

  static PeerSecurity Secure(const std::string& host) {
    return {TestCertificates::Shared().Identity(host), PlainPeers::kThisHost};
  }

  // A conversation up to its first answer.
  absl::StatusOr<std::unique_ptr<ControlChannel>> Begin(const PeerSecurity& security) {
    TcpDialer dialer("127.0.0.1", port_, security);
    auto connection = dialer.Dial({.kind = Preamble::Kind::kControl}, deadline_);
    if (!connection.ok()) return connection.status();
    auto channel = std::make_unique<ControlChannel>(*std::move(connection), "the target");
    if (auto v = ExchangeHello(channel.get(), deadline_); !v.ok()) return v.status();
    return channel;
  }

  absl::StatusOr<std::unique_ptr<ControlChannel>> Open(const std::string& host,
                                                       const SessionId& session,
                                                       const std::string& guest = "g1") {
    auto channel = Begin(Secure(host));
    if (!channel.ok()) return channel;
    Body open;
    open.mutable_open_session()->set_session_id(IdToBytes(session));
    open.mutable_open_session()->set_guest(guest);
    open.mutable_open_session()->set_page_bytes(kPageBytes);
    for (const Region& region : source_.memory().regions()) {
      wire::RegionSpec* spec = open.mutable_open_session()->add_regions();
      spec->set_name(region.name());
      spec->set_size_bytes(region.size_bytes());
    }
    if (absl::Status s = (*channel)->Send(open, deadline_); !s.ok()) return s;
    const auto opened = Expect(channel->get(), Body::kSessionOpened, deadline_);
    if (!opened.ok()) return opened.status();
    return channel;
  }

  absl::StatusOr<Body> OpenLink(ControlChannel* channel, wire::OpenLink::Kind kind) {
    Body open;
    open.mutable_open_link()->set_link(++links_);
    open.mutable_open_link()->set_kind(kind);
    open.mutable_open_link()->set_tcp_streams(1);
    if (absl::Status s = channel->Send(open, deadline_); !s.ok()) return s;
    return channel->Receive(deadline_);
  }

  int LogLines(const std::string& words) {
    MutexLock lock(&log_mutex_);
    return static_cast<int>(std::count_if(log_.begin(), log_.end(), [&](const std::string& line) {
      return line.find(words) != std::string::npos;
    }));
  }

  static bool Lives(ControlChannel* channel) {
    Body ping;
    ping.mutable_ping()->set_sequence(7);
    const absl::Time deadline = MonotonicNow() + absl::Seconds(20);
    return channel->Send(ping, deadline).ok() && Expect(channel, Body::kPong, deadline).ok();
  }

  const absl::Time deadline_ = MonotonicNow() + absl::Seconds(60);
  uint32_t links_ = 0;
  Mutex log_mutex_;
  std::vector<std::string> log_ ABSL_GUARDED_BY(log_mutex_);
};

TEST_F(PeerTest, OnTheListMayAndIsNamed) {
  const auto channel = Open("one", RandomId());
  ASSERT_TRUE(channel.ok()) << channel.status();
  ASSERT_EQ(service_->status().size(), 1u);
  EXPECT_EQ(service_->status()[0].peer_name, "one");
  EXPECT_THAT(service_->status()[0].peer, HasSubstr("(one)"));
}

TEST_F(PeerTest, NotOnTheListMayNotAndIsToldSoButLoggedOnce) {
  for (int i = 0; i < 5; ++i) {
    const absl::Status status = Open("two", RandomId()).status();  // the target's own, even
    EXPECT_EQ(status.code(), absl::StatusCode::kPermissionDenied) << status;
    EXPECT_THAT(status.ToString(), HasSubstr("[peer.\"two\"]"));
  }
  EXPECT_TRUE(Await([&] { return LogLines("may not keep guests") > 0; }));
  EXPECT_EQ(LogLines("may not keep guests"), 1);
  EXPECT_EQ(host_.places_made(), 0);
  const auto asks = Begin(Secure("two"));
  ASSERT_TRUE(asks.ok());
  Body query;
  query.mutable_query_outcome()->set_session_id(IdToBytes(RandomId()));
  query.mutable_query_outcome()->set_guest("g1");
  ASSERT_TRUE((*asks)->Send(query, deadline_).ok());
  EXPECT_EQ(Expect(asks->get(), Body::kOutcome, deadline_).status().code(),
            absl::StatusCode::kPermissionDenied);
}

TEST_F(PeerTest, WithoutTlsNobodyComes) {
  EXPECT_FALSE(Begin({nullptr, PlainPeers::kAnyone}).ok());
  EXPECT_TRUE(Await([&] { return LogLines("does not speak TLS") == 1; }));
  target_options_.admission.security = {};
  Restart();
  const absl::Status status = Begin(Secure("one")).status();
  EXPECT_THAT(status.ToString(), HasSubstr("does its presyncd have certificates"));
  EXPECT_TRUE(Await([&] { return LogLines("it speaks TLS, and this host has no") == 1; }));
}

TEST_F(PeerTest, TakesNoMoreThanItsRulesAllow) {
  const uint64_t guest_bytes = PagesToBytes(kPages);
  (*target_options_.peers)["one"] = {.max_guests = 1};
  (*target_options_.peers)["elsewhere"] = {.max_memory_bytes = guest_bytes - 1,
                                           .guests = {"g1", "web-*"}};
  Restart();
  const auto first = Open("one", RandomId());
  ASSERT_TRUE(first.ok()) << first.status();
  absl::Status status = Open("one", RandomId(), "g2").status();
  EXPECT_EQ(status.code(), absl::StatusCode::kResourceExhausted) << status;
  EXPECT_THAT(status.ToString(), HasSubstr("max_guests"));
  status = Open("elsewhere", RandomId(), "web-9").status();
  EXPECT_EQ(status.code(), absl::StatusCode::kResourceExhausted) << status;
  EXPECT_THAT(status.ToString(), HasSubstr("max_memory"));
  status = Open("elsewhere", RandomId(), "g2").status();
  EXPECT_EQ(status.code(), absl::StatusCode::kPermissionDenied) << status;
  EXPECT_EQ(host_.places_made(), 1);
  EXPECT_TRUE(Lives(first->get()));
}

TEST_F(PeerTest, WhoMayNotReplacesNoLostSessionEither) {
  (*target_options_.peers)["elsewhere"] = {.guests = {"g2"}};
  Restart();
  const SessionId session = RandomId();
  { ASSERT_TRUE(Open("one", session).ok()); }
  ASSERT_TRUE(Await([&] { return service_->status()[0].state == "lost"; }));
  EXPECT_EQ(Open("elsewhere", RandomId()).status().code(), absl::StatusCode::kPermissionDenied);
  ASSERT_EQ(service_->status().size(), 1u);
  EXPECT_EQ(service_->status()[0].session, IdToHex(session));
}

// Nor somebody who may: the copy is kept for its own source to come back, and whose it is is not
// said.
TEST_F(PeerTest, AnotherPeersLostCopyIsItsOwn) {
  const SessionId session = RandomId();
  {
    ASSERT_TRUE(Open("one", session).ok());
    const absl::Status busy = Open("elsewhere", RandomId()).status();
    EXPECT_EQ(busy.code(), absl::StatusCode::kAlreadyExists) << busy;
    EXPECT_THAT(busy.ToString(), HasSubstr("another peer"));
    EXPECT_THAT(busy.ToString(), Not(HasSubstr("one)")));
  }
  ASSERT_TRUE(Await([&] { return service_->status()[0].state == "lost"; }));
  const absl::Status lost = Open("elsewhere", RandomId()).status();
  EXPECT_EQ(lost.code(), absl::StatusCode::kAlreadyExists) << lost;
  EXPECT_THAT(lost.ToString(), AllOf(HasSubstr("another peer"), HasSubstr("until")));
  ASSERT_EQ(service_->status().size(), 1u);
  EXPECT_EQ(service_->status()[0].session, IdToHex(session));
  EXPECT_TRUE(Open("one", RandomId()).ok()) << "its own";
}

TEST_F(PeerTest, APeerWithTooManyRecordsOpensNoNewSession) {
  target_options_.max_records_of_a_peer = 2;
  Restart();
  HandoverEntry entry = {.role = HandoverRole::kTarget,
                         .phase = HandoverPhase::kNeverRan,
                         .guest = "g9",
                         .session = RandomId(),
                         .peer_name = "one"};
  ASSERT_TRUE(HandoverRecord::Open(target_folder_.path(), entry).ok());
  const SessionId session = RandomId();
  { ASSERT_TRUE(Open("one", session).ok()); }
  ASSERT_TRUE(Await([&] { return service_->status()[0].state == "lost"; }));
  entry.session = RandomId();
  ASSERT_TRUE(HandoverRecord::Open(target_folder_.path(), entry).ok());
  const absl::Status status = Open("one", RandomId(), "g2").status();
  EXPECT_EQ(status.code(), absl::StatusCode::kResourceExhausted) << status;
  EXPECT_THAT(status.ToString(), HasSubstr("on record"));
  EXPECT_TRUE(Open("one", session).ok()) << "what was begun goes on";
  const absl::Status other = Open("elsewhere", RandomId(), "g2").status();
  EXPECT_EQ(other.code(), absl::StatusCode::kNotFound)
      << "not for its records, of which it has none";
  EXPECT_TRUE(HandoverRecord::Read(target_folder_.path(), entry).ok()) << "none was dropped";
}

TEST_F(PeerTest, AllPeersTogetherTakeNoMoreThanEveryoneMay) {
  target_options_.everyone = {.max_guests = 1};
  Restart();
  const auto first = Open("one", RandomId());
  ASSERT_TRUE(first.ok()) << first.status();
  EXPECT_EQ(Open("elsewhere", RandomId(), "g2").status().code(),
            absl::StatusCode::kResourceExhausted);
}

TEST_F(PeerTest, FilesLieWhereTheyMay) {
  (*target_options_.peers)["one"].folders = {"/nowhere"};
  Restart();
  const absl::Status status = Open("one", RandomId()).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kPermissionDenied) << status;
  EXPECT_THAT(status.ToString(), HasSubstr("/nowhere"));
  EXPECT_TRUE(Await([&] { return service_->status().empty(); }))
      << "once its conversation has ended";
}

TEST_F(PeerTest, ASessionIsItsPeersOwn) {
  const SessionId session = RandomId();
  const auto own = Open("one", session);
  ASSERT_TRUE(own.ok()) << own.status();
  EXPECT_EQ(Open("elsewhere", session).status().code(), absl::StatusCode::kPermissionDenied);
  // Asking would end the conversation, if it were one's own.
  const auto asks = Begin(Secure("elsewhere"));
  ASSERT_TRUE(asks.ok()) << asks.status();
  Body query;
  query.mutable_query_outcome()->set_session_id(IdToBytes(session));
  query.mutable_query_outcome()->set_guest("g1");
  ASSERT_TRUE((*asks)->Send(query, deadline_).ok());
  const auto outcome = Expect(asks->get(), Body::kOutcome, deadline_);
  ASSERT_TRUE(outcome.ok()) << outcome.status();
  EXPECT_EQ(outcome->outcome().value(), wire::Outcome::UNKNOWN);
  EXPECT_THAT(outcome->outcome().text(), HasSubstr("another peer"));
  EXPECT_TRUE(Lives(own->get()));
}

TEST_F(PeerTest, ARecordAnswersItsPeerOnly) {
  const SessionId session = RandomId();
  ASSERT_TRUE(HandoverRecord::Open(target_folder_.path(), {.role = HandoverRole::kTarget,
                                                           .phase = HandoverPhase::kNeverRan,
                                                           .guest = "g1",
                                                           .session = session,
                                                           .peer_name = "one"})
                  .ok());
  EXPECT_EQ(service_->Outcome(session, "g1", "elsewhere", /*end_it=*/false).value(),
            wire::Outcome::UNKNOWN);
  EXPECT_EQ(service_->Outcome(session, "g1", "one", /*end_it=*/false).value(),
            wire::Outcome::NEVER_RAN);
}

TEST_F(PeerTest, ATokenIsForItsPeerAndForOnce) {
  const auto own = Open("one", RandomId());
  ASSERT_TRUE(own.ok()) << own.status();
  const auto offer = OpenLink(own->get(), wire::OpenLink::TCP);
  ASSERT_TRUE(offer.ok()) << offer.status();
  const Preamble preamble = {.kind = Preamble::Kind::kData,
                             .token = *IdFromBytes(offer->link_offer().token())};
  const auto dial = [&](const std::string& host) {
    return TcpDialer("127.0.0.1", port_, Secure(host)).Dial(preamble, deadline_);
  };
  const auto stolen = dial("elsewhere");
  EXPECT_TRUE(Await([&] { return LogLines("is not expected from this peer") == 1; }));
  const auto right = dial("one");
  ASSERT_TRUE(right.ok()) << right.status();
  ASSERT_TRUE(Expect(own->get(), Body::kLinkReady, deadline_).ok());
  auto replayed = dial("one");
  ASSERT_TRUE(replayed.ok()) << replayed.status();
  char byte = 0;
  short events = 0;
  EXPECT_TRUE(Await([&] { return !replayed->TryReceive({&byte, 1}, &events).ok(); }));
  EXPECT_TRUE(Lives(own->get()));
}

TEST_F(PeerTest, RdmaIsRefusedWhereEncryptionIsRequired) {
  target_options_.require_encryption = true;
  Restart();
  const auto channel = Open("one", RandomId());
  ASSERT_TRUE(channel.ok()) << channel.status();
  const auto answer = OpenLink(channel->get(), wire::OpenLink::RDMA);
  ASSERT_TRUE(answer.ok()) << answer.status();
  ASSERT_TRUE(answer->has_link_refused());
  EXPECT_THAT(answer->link_refused().text(), HasSubstr("require_encryption"));
}

TEST_F(PeerTest, WhoSaysNothingIsCountedAndDropped) {
  target_options_.newcomers.a_place = 4;
  target_options_.preamble_timeout = absl::Milliseconds(300);
  Restart();
  std::vector<UniqueFd> silent;
  for (int i = 0; i < 20; ++i) silent.push_back(*Connect("127.0.0.1", port_, deadline_));
  EXPECT_TRUE(Await([&] { return LogLines("did not say what it is for") == 1; }));
  EXPECT_TRUE(Await([&] { return LogLines("too many new connections") == 1; }));
  EXPECT_TRUE(Open("one", RandomId()).ok()) << "the crowd makes room";
  EXPECT_EQ(LogLines("did not say what it is for"), 1);
}

TEST_F(PeerTest, DeviceStateBeyondTheBudgetIsRefusedAndTheGuestGoesOn) {
  target_options_.state.a_peer_bytes = 1;
  Restart();
  StartSync();
  const absl::StatusOr<HandoverReport> report = Launch();
  EXPECT_FALSE(report.ok());
  EXPECT_THAT(report.status().ToString(), HasSubstr("device state"));
  EXPECT_TRUE(Await([&] { return world_.source_running(); }));
  EXPECT_FALSE(world_.target_running());
}

TEST_F(PeerTest, AWholeMoveWithinTls) {
  StartSync();
  StartWriting();
  const absl::StatusOr<HandoverReport> report = Launch();
  StopWriting();
  ASSERT_TRUE(report.ok()) << report.status();
  EXPECT_TRUE(world_.target_running());
  EXPECT_EQ(Differences(), std::vector<PageIndex>());
}

}  // namespace
}  // namespace presync
