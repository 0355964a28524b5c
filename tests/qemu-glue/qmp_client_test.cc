#include "qemu-glue/qmp/qmp_client.h"

#include <fcntl.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <future>

#include "absl/strings/str_cat.h"
#include "tests/qemu-glue/fake_qmp_server.h"
#include "transport/clock.h"

namespace presync {
namespace {

using ::testing::HasSubstr;

// Long enough that only a hang reaches it; short for the tests that wait for it on purpose.
absl::Time Soon() { return MonotonicNow() + absl::Seconds(30); }
absl::Time AtOnce() { return MonotonicNow() + absl::Milliseconds(50); }

std::unique_ptr<QmpClient> ConnectTo(const FakeQmpServer& server) {
  absl::StatusOr<std::unique_ptr<QmpClient>> client = QmpClient::Connect(server.path(), Soon());
  EXPECT_TRUE(client.ok()) << client.status();
  return client.ok() ? *std::move(client) : nullptr;
}

TEST(QmpConnect, ReadsTheGreetingAndThePeer) {
  FakeQmpServer server([](FakeQmpConnection& qemu) { qemu.Greet(); });
  std::unique_ptr<QmpClient> client = ConnectTo(server);
  ASSERT_NE(client, nullptr);
  EXPECT_EQ(client->version().major, 9u);
  EXPECT_EQ(client->version().minor, 1u);
  EXPECT_EQ(client->version().micro, 2u);
  EXPECT_EQ(client->peer_pid(), ::getpid());
}

TEST(QmpConnect, PassesOverWhatWasForTheLastClient) {
  FakeQmpServer server([](FakeQmpConnection& qemu) {
    qemu.Send("{\"event\": \"STOP\", \"timestamp\": {\"seconds\": 1, \"microseconds\": 0}}\n");
    qemu.Send("{\"return\": {}, \"id\": 1}\n");
    qemu.Greet();
  });
  std::unique_ptr<QmpClient> client = ConnectTo(server);
  ASSERT_NE(client, nullptr);
  EXPECT_EQ(client->version().major, 9u);
  EXPECT_TRUE(absl::IsDeadlineExceeded(client->WaitEvent("STOP", AtOnce()).status()) ||
              absl::IsUnavailable(client->WaitEvent("STOP", AtOnce()).status()));
}

TEST(QmpConnect, SaysThatThereIsNoSocket) {
  absl::Status status = QmpClient::Connect("/tmp/presync-no-such-socket", Soon()).status();
  EXPECT_TRUE(absl::IsNotFound(status)) << status;
  EXPECT_THAT(std::string(status.message()), HasSubstr("server=on,wait=off"));
}

TEST(QmpConnect, RejectsAPathThatFitsNoSocket) {
  absl::Status status = QmpClient::Connect(std::string(200, 'x'), Soon()).status();
  EXPECT_TRUE(absl::IsInvalidArgument(status)) << status;
}

TEST(QmpConnect, SaysThatNobodyListens) {
  char path[] = "/tmp/presync-refused-XXXXXX";
  UniqueFd file(::mkstemp(path));
  absl::Status status = QmpClient::Connect(path, Soon()).status();
  ::unlink(path);
  EXPECT_TRUE(absl::IsUnavailable(status)) << status;
}

// Copying such a value takes stack by its depth.
TEST(QmpExecute, RefusesAnAnswerThatNestsWithoutEnd) {
  const std::string deep = std::string(200'000, '[') + std::string(200'000, ']');
  FakeQmpServer server([&deep](FakeQmpConnection& qemu) {
    qemu.Greet();
    qemu.ReadCommand();
    qemu.Send("{\"id\": 2, \"return\": " + deep + "}\n");
    qemu.AwaitHangUp();
  });
  auto client = QmpClient::Connect(server.path(), Soon());
  ASSERT_TRUE(client.ok()) << client.status();
  EXPECT_TRUE(absl::IsInvalidArgument((*client)->Execute("x", nullptr, Soon()).status()));
}

TEST(QmpConnect, NamesWhatDoesNotSpeakQmp) {
  for (const char* text :
       {"QEMU 7.2.22 monitor - type 'help'\r\n", "{}\n", "[1]\n", "{\"QMP\": 3}\n",
        "{\"QMP\": {\"version\": {\"qemu\": {\"major\": \"x\"}}}}\n"}) {
    FakeQmpServer server([text](FakeQmpConnection& qemu) { qemu.Send(text); });
    absl::Status status = QmpClient::Connect(server.path(), Soon()).status();
    EXPECT_TRUE(absl::IsInvalidArgument(status)) << text << status;
    EXPECT_THAT(std::string(status.message()), HasSubstr(server.path() + " does not speak QMP"));
  }
}

TEST(QmpConnect, NamesGarbageWithoutALineEnd) {
  FakeQmpServer server([](FakeQmpConnection& qemu) {
    qemu.Send("login: ");
    qemu.AwaitHangUp();
  });
  absl::Status status = QmpClient::Connect(server.path(), AtOnce()).status();
  EXPECT_TRUE(absl::IsInvalidArgument(status)) << status;
  EXPECT_THAT(std::string(status.message()), HasSubstr("login: "));
}

TEST(QmpConnect, SaysThatTheMonitorMayBeTaken) {
  FakeQmpServer server([](FakeQmpConnection& qemu) {
    qemu.Greet();
    qemu.AwaitHangUp();
  });
  std::unique_ptr<QmpClient> first = ConnectTo(server);
  // The server never accepts a second one: it waits in the socket's queue, as at a real monitor.
  absl::Status status = QmpClient::Connect(server.path(), AtOnce()).status();
  EXPECT_TRUE(absl::IsDeadlineExceeded(status)) << status;
  EXPECT_THAT(std::string(status.message()), HasSubstr("another client"));
}

TEST(QmpConnect, SurvivesAQueueThatIsFull) {
  FakeQmpServer server([](FakeQmpConnection& qemu) { qemu.AwaitHangUp(); });
  std::vector<UniqueFd> others;
  sockaddr_un address = {};
  address.sun_family = AF_UNIX;
  server.path().copy(address.sun_path, sizeof(address.sun_path) - 1);
  while (true) {
    others.emplace_back(::socket(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0));
    if (::connect(others.back().get(), reinterpret_cast<sockaddr*>(&address), sizeof(address)) !=
        0) {
      ASSERT_EQ(errno, EAGAIN);
      if (others.size() > 3) break;  // one accepted, two queued: full for good
    }
    ASSERT_LT(others.size(), 1000u);
  }
  absl::Status status = QmpClient::Connect(server.path(), AtOnce()).status();
  EXPECT_TRUE(absl::IsDeadlineExceeded(status)) << status;
}

TEST(QmpConnect, SaysThatQemuEnded) {
  FakeQmpServer server([](FakeQmpConnection& qemu) { qemu.Send(kGreeting.substr(0, 20)); });
  absl::Status status = QmpClient::Connect(server.path(), Soon()).status();
  EXPECT_TRUE(absl::IsUnavailable(status)) << status;
}

TEST(QmpExecute, PicksItsReplyOutOfEventsAndStrangers) {
  FakeQmpServer server([](FakeQmpConnection& qemu) {
    qemu.Greet();
    const Json command = qemu.ReadCommand();
    qemu.Send("{\"event\": \"STOP\", \"timestamp\": {}}\n");
    qemu.Send("{\"return\": \"not mine\", \"id\": 77777}\n{\"return\": \"no id\"}\n");
    qemu.Send("{\"return\": \"odd id\", \"id\": [\"x\"]}\n");
    qemu.Reply(command, {{"got", command["arguments"]}});
    qemu.AwaitHangUp();
  });
  std::unique_ptr<QmpClient> client = ConnectTo(server);
  absl::StatusOr<Json> result = client->Execute("x", {{"a", 1}}, Soon());
  ASSERT_TRUE(result.ok()) << result.status();
  EXPECT_EQ((*result)["got"]["a"], 1);
  absl::StatusOr<QmpEvent> event = client->WaitEvent("STOP", AtOnce());
  ASSERT_TRUE(event.ok()) << event.status();
  EXPECT_TRUE(event->data.is_null());
}

TEST(QmpExecuteAll, SendsAllBeforeTheFirstAnswerAndKeepsTheOrder) {
  FakeQmpServer server([](FakeQmpConnection& qemu) {
    qemu.Greet();
    const Json first = qemu.ReadCommand();
    const Json second = qemu.ReadCommand();
    qemu.Reply(first, 1);
    qemu.Send("{\"event\": \"STOP\", \"timestamp\": {\"seconds\": 1, \"microseconds\": 0}}\n");
    qemu.Reply(second, 2);
    qemu.Reply(qemu.ReadCommand(), 3);
    qemu.Refuse(qemu.ReadCommand(), "no");
    qemu.Reply(qemu.ReadCommand(), 5);
    qemu.Reply(qemu.ReadCommand(), 6);
    qemu.AwaitHangUp();
  });
  std::unique_ptr<QmpClient> client = ConnectTo(server);
  ASSERT_NE(client, nullptr);
  absl::StatusOr<std::vector<Json>> results =
      client->ExecuteAll({{"a", nullptr}, {"b", {{"x", 1}}}}, Soon());
  ASSERT_TRUE(results.ok()) << results.status();
  EXPECT_THAT(*results, ::testing::ElementsAre(1, 2));
  results = client->ExecuteAll({{"c", nullptr}, {"d", nullptr}, {"e", nullptr}}, Soon());
  EXPECT_TRUE(absl::IsFailedPrecondition(results.status())) << results.status();
  EXPECT_EQ(client->Execute("f", nullptr, Soon()).value_or(0), 6);  // not the answer to "e"
}

TEST(QmpDropEvents, ForgetsWhatCameOfOneNameOnly) {
  FakeQmpServer server([](FakeQmpConnection& qemu) {
    qemu.Greet();
    qemu.Send("{\"event\": \"STOP\", \"timestamp\": {\"seconds\": 1, \"microseconds\": 0}}\n");
    qemu.Send("{\"event\": \"RESUME\", \"timestamp\": {\"seconds\": 2, \"microseconds\": 0}}\n");
    qemu.Reply(qemu.ReadCommand(), 1);
    qemu.AwaitHangUp();
  });
  std::unique_ptr<QmpClient> client = ConnectTo(server);
  ASSERT_NE(client, nullptr);
  ASSERT_TRUE(client->Execute("x", nullptr, Soon()).ok());
  client->DropEvents("STOP");
  EXPECT_TRUE(absl::IsDeadlineExceeded(client->WaitEvent("STOP", AtOnce()).status()));
  EXPECT_TRUE(client->WaitEvent("RESUME", AtOnce()).ok());
}

TEST(QmpExecuteUntil, TakesTheEventForTheReply) {
  FakeQmpServer server([](FakeQmpConnection& qemu) {
    qemu.Greet();
    qemu.Send("{\"event\": \"RESUME\"}\n");
    qemu.Reply(qemu.ReadCommand(), 1);
    const Json cont = qemu.ReadCommand();
    qemu.Send("{\"event\": \"STOP\"}\n{\"event\": \"RESUME\"}\n");
    const Json next = qemu.ReadCommand();  // sent although `cont` was not answered yet
    qemu.Reply(cont, 2);
    qemu.Reply(next, 3);
    qemu.AwaitHangUp();
  });
  std::unique_ptr<QmpClient> client = ConnectTo(server);
  ASSERT_TRUE(client->Execute("x", nullptr, Soon()).ok());  // an old event is in the queue
  absl::StatusOr<bool> resumed = client->ExecuteUntil("cont", nullptr, "RESUME", Soon());
  ASSERT_TRUE(resumed.ok()) << resumed.status();
  EXPECT_TRUE(*resumed);
  absl::StatusOr<Json> next = client->Execute("y", nullptr, Soon());
  ASSERT_TRUE(next.ok()) << next.status();
  EXPECT_EQ(*next, 3);
}

TEST(QmpExecuteUntil, AnOldEventDoesNotCountAndARefusalIsPassedOn) {
  FakeQmpServer server([](FakeQmpConnection& qemu) {
    qemu.Greet();
    qemu.Send("{\"event\": \"RESUME\"}\n");
    qemu.Reply(qemu.ReadCommand(), 1);
    qemu.Reply(qemu.ReadCommand(), 2);
    qemu.Refuse(qemu.ReadCommand(), "the disk is locked");
    qemu.AwaitHangUp();
  });
  std::unique_ptr<QmpClient> client = ConnectTo(server);
  ASSERT_TRUE(client->Execute("x", nullptr, Soon()).ok());
  absl::StatusOr<bool> resumed = client->ExecuteUntil("cont", nullptr, "RESUME", Soon());
  ASSERT_TRUE(resumed.ok()) << resumed.status();
  EXPECT_FALSE(*resumed);
  absl::Status refused = client->ExecuteUntil("cont", nullptr, "RESUME", Soon()).status();
  EXPECT_TRUE(absl::IsFailedPrecondition(refused)) << refused;
}

TEST(QmpExecute, PassesOnQemusWords) {
  FakeQmpServer server([](FakeQmpConnection& qemu) {
    qemu.Greet();
    qemu.Refuse(qemu.ReadCommand(), "State blocked by device");
    qemu.ReadCommand();
    qemu.Send("{\"error\": {\"class\": \"Odd\", \"desc\": \"no id at all\"}}\n");
    qemu.AwaitHangUp();
  });
  std::unique_ptr<QmpClient> client = ConnectTo(server);
  absl::Status status = client->Execute("migrate", nullptr, Soon()).status();
  EXPECT_TRUE(absl::IsFailedPrecondition(status)) << status;
  EXPECT_THAT(std::string(status.message()),
              HasSubstr("'migrate': State blocked by device (GenericError)"));
  status = client->Execute("x", nullptr, Soon()).status();
  EXPECT_TRUE(absl::IsFailedPrecondition(status)) << status;
  EXPECT_THAT(std::string(status.message()), HasSubstr("no id at all"));
}

// They come to a log and to a terminal.
TEST(QmpExecute, QemusWordsDoNothingToATerminal) {
  FakeQmpServer server([](FakeQmpConnection& qemu) {
    qemu.Greet();
    qemu.Refuse(qemu.ReadCommand(),
                "no\n2026-11-30 info: all is well\x1b[2J\xc2\x9b"
                "31m");
    qemu.AwaitHangUp();
  });
  std::unique_ptr<QmpClient> client = ConnectTo(server);
  const std::string text(client->Execute("migrate", nullptr, Soon()).status().message());
  EXPECT_THAT(text, HasSubstr("no\\n2026-11-30 info: all is well\\x1b[2J\\u009b31m"));
  for (const unsigned char c : text) EXPECT_GE(c, 0x20);
}

TEST(QmpExecute, JoinsPiecesAndSplitsBatches) {
  FakeQmpServer server([](FakeQmpConnection& qemu) {
    qemu.Greet();
    const Json command = qemu.ReadCommand();
    const std::string reply = ToText({{"return", 5}, {"id", command["id"]}}) + "\n";
    for (char c : reply) qemu.Send(std::string_view(&c, 1));
    const Json second = qemu.ReadCommand();
    qemu.Send("{\"event\": \"A\"}\n{\"event\": \"B\"}\n" +
              ToText({{"return", std::string(300000, 'z')}, {"id", second["id"]}}) + "\n");
    qemu.AwaitHangUp();
  });
  std::unique_ptr<QmpClient> client = ConnectTo(server);
  EXPECT_EQ(client->Execute("x", nullptr, Soon()).value_or(0), 5);
  absl::StatusOr<Json> large = client->Execute("y", nullptr, Soon());
  ASSERT_TRUE(large.ok()) << large.status();
  EXPECT_EQ(large->get_ref<const std::string&>().size(), 300000u);
  EXPECT_TRUE(client->WaitEvent("B", AtOnce()).ok());
  EXPECT_TRUE(client->WaitEvent("A", AtOnce()).ok());
}

TEST(QmpExecute, GivesUpInTimeAndIgnoresTheLateReply) {
  std::promise<void> gave_up;
  FakeQmpServer server([&gave_up](FakeQmpConnection& qemu) {
    qemu.Greet();
    const Json slow = qemu.ReadCommand();
    gave_up.get_future().wait();
    qemu.Reply(slow, "late");
    qemu.Reply(qemu.ReadCommand(), "in time");
    qemu.AwaitHangUp();
  });
  std::unique_ptr<QmpClient> client = ConnectTo(server);
  absl::Status status = client->Execute("slow", nullptr, AtOnce()).status();
  EXPECT_TRUE(absl::IsDeadlineExceeded(status)) << status;
  gave_up.set_value();
  EXPECT_EQ(client->Execute("quick", nullptr, Soon()).value_or(""), "in time");
}

TEST(QmpExecute, StaysBrokenAfterQemuEnded) {
  FakeQmpServer server([](FakeQmpConnection& qemu) {
    qemu.Greet();
    qemu.ReadCommand();
    qemu.Send("{\"event\": \"SHUTDOWN\"}\n{\"retu");
  });
  std::unique_ptr<QmpClient> client = ConnectTo(server);
  EXPECT_TRUE(absl::IsUnavailable(client->Execute("x", nullptr, Soon()).status()));
  EXPECT_TRUE(absl::IsUnavailable(client->Execute("x", nullptr, Soon()).status()));
  EXPECT_TRUE(absl::IsUnavailable(client->Post("x", nullptr, Soon())));
  EXPECT_TRUE(client->WaitEvent("SHUTDOWN", Soon()).ok());  // what came before is still there
  EXPECT_TRUE(absl::IsUnavailable(client->WaitEvent("SHUTDOWN", Soon()).status()));
}

TEST(QmpExecute, RefusesWhatIsNoQmp) {
  for (const std::string& text :
       {std::string("hello\n"), std::string("[]\n"), std::string("{\"a\": \n"),
        std::string("\xff\xfe\n"), std::string("{\"id\": 2}\n"),
        std::string(QmpClient::kMaxLineBytes + 70000, ' ')}) {
    FakeQmpServer server([&text](FakeQmpConnection& qemu) {
      qemu.Greet();
      qemu.ReadCommand();
      qemu.Send(text);
      qemu.AwaitHangUp();
    });
    std::unique_ptr<QmpClient> client = ConnectTo(server);
    absl::Status status = client->Execute("x", nullptr, Soon()).status();
    EXPECT_TRUE(absl::IsInvalidArgument(status)) << text.substr(0, 20) << status;
    EXPECT_TRUE(absl::IsInvalidArgument(client->Execute("x", nullptr, Soon()).status()));
  }
}

TEST(QmpExecute, PassesADescriptor) {
  int ends[2];
  ASSERT_EQ(::pipe2(ends, O_CLOEXEC), 0);
  UniqueFd read_end(ends[0]);
  UniqueFd write_end(ends[1]);
  FakeQmpServer server([](FakeQmpConnection& qemu) {
    qemu.Greet();
    const Json command = qemu.ReadCommand();
    const bool written = qemu.passed_fd().valid() && ::write(qemu.passed_fd().get(), "hi", 2) == 2;
    qemu.Reply(command, written);
    qemu.AwaitHangUp();
  });
  std::unique_ptr<QmpClient> client = ConnectTo(server);
  EXPECT_EQ(client->Execute("getfd", {{"fdname", "f"}}, Soon(), write_end.get()).value_or(false),
            true);
  char text[2];
  EXPECT_EQ(::read(read_end.get(), text, 2), 2);
  EXPECT_TRUE(absl::IsInvalidArgument(client->Execute("getfd", nullptr, Soon(), 9999).status()));
}

TEST(QmpExecute, GivesUpOnAQemuThatReadsNothing) {
  std::promise<void> done;
  FakeQmpServer server([&done](FakeQmpConnection& qemu) {
    qemu.Greet();
    done.get_future().wait();
  });
  std::unique_ptr<QmpClient> client = ConnectTo(server);
  const Json large = {{"text", std::string(4 << 20, 'x')}};  // more than a socket holds
  absl::Status status = client->Execute("x", large, AtOnce()).status();
  EXPECT_TRUE(absl::IsDeadlineExceeded(status)) << status;
  // Half a command is out; nothing may follow it.
  EXPECT_TRUE(absl::IsDeadlineExceeded(client->Execute("y", nullptr, Soon()).status()));
  done.set_value();
}

TEST(QmpEvents, KeepTheNewestAndTheirOrder) {
  constexpr size_t kSent = QmpClient::kMaxEvents + 10;
  FakeQmpServer server([](FakeQmpConnection& qemu) {
    qemu.Greet();
    const Json command = qemu.ReadCommand();
    for (size_t i = 0; i < kSent; ++i) {
      qemu.Send(absl::StrCat("{\"event\": \"E\", \"data\": {\"i\": ", i, "}}\n"));
    }
    qemu.Reply(command, 0);
    qemu.ReadCommand();
    for (size_t i = 0; i < kSent; ++i) {
      qemu.Send(absl::StrCat("{\"event\": \"F\", \"data\": {\"i\": ", i, "}}\n"));
    }
    qemu.Send("{\"event\": \"LAST\"}\n");
    qemu.AwaitHangUp();
  });
  std::unique_ptr<QmpClient> client = ConnectTo(server);
  ASSERT_TRUE(client->Execute("x", nullptr, Soon()).ok());
  absl::StatusOr<QmpEvent> event = client->WaitEvent("E", AtOnce());
  ASSERT_TRUE(event.ok()) << event.status();
  EXPECT_EQ(UintAt(event->data, "i"), kSent - QmpClient::kMaxEvents);
  // Waiting goes on through a queue that overflows meanwhile, and sees each event once.
  ASSERT_TRUE(client->Post("y", nullptr, Soon()).ok());
  size_t looked_at_last = 0;
  event = client->WaitEvent(
      [&](const QmpEvent& candidate) {
        looked_at_last += candidate.name == "LAST" ? 1 : 0;
        return candidate.name == "LAST";
      },
      Soon());
  ASSERT_TRUE(event.ok()) << event.status();
  EXPECT_EQ(looked_at_last, 1u);
  EXPECT_TRUE(absl::IsDeadlineExceeded(client->WaitEvent("LAST", AtOnce()).status()));
}

// Sends without end, until the client hangs up.
FakeQmpServer::Script Flood(const std::string& line) {
  return [line](FakeQmpConnection& qemu) {
    qemu.Greet();
    std::string lines;
    while (lines.size() < 200000) lines += line;
    while (qemu.Send(lines)) {
    }
  };
}

TEST(QmpFlood, EventsWithoutEndDelayNobodyForEver) {
  // Sent faster than it is parsed, so that there is always more.
  std::string zeros;
  while (zeros.size() < 8000) zeros += "0,";
  FakeQmpServer server(Flood("{\"event\": \"RTC_CHANGE\", \"data\": {\"x\": [" + zeros + "0]}}\n"));
  std::unique_ptr<QmpClient> client = ConnectTo(server);
  const absl::Time start = MonotonicNow();
  EXPECT_EQ(client->Execute("query-status", nullptr, AtOnce()).status().code(),
            absl::StatusCode::kDeadlineExceeded);
  EXPECT_EQ(client->WaitEvent("STOP", AtOnce()).status().code(),
            absl::StatusCode::kDeadlineExceeded);
  EXPECT_LE(client->TakeEvents("RTC_CHANGE").size(), QmpClient::kMaxEvents);
  EXPECT_LT(MonotonicNow() - start, absl::Seconds(30));
}

TEST(QmpFlood, AGreetingIsNotWaitedForWithoutEnd) {
  FakeQmpServer server([](FakeQmpConnection& qemu) {
    while (qemu.Send("{\"event\": \"STOP\"}\n")) {
    }
  });
  EXPECT_FALSE(QmpClient::Connect(server.path(), AtOnce()).ok());
}

TEST(QmpFlood, EventsAreKeptOnlyAsShortAsTheyAre) {
  FakeQmpServer server([](FakeQmpConnection& qemu) {
    qemu.Greet();
    qemu.Send("{\"event\": \"LONG\", \"data\": {\"x\": \"" + std::string(1 << 20, 'x') +
              "\"}}\n{\"event\": \"SHORT\"}\n");
    qemu.AwaitHangUp();
  });
  std::unique_ptr<QmpClient> client = ConnectTo(server);
  EXPECT_TRUE(client->WaitEvent("SHORT", Soon()).ok());
  EXPECT_TRUE(client->TakeEvents("LONG").empty());
}

}  // namespace
}  // namespace presync
