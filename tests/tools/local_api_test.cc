// Asking a presyncd that takes its time.
#include "tools/common/local_api.h"

#include <gtest/gtest.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <atomic>
#include <filesystem>
#include <thread>

#include "transport/clock.h"
#include "transport/unique_fd.h"
#include "transport/unix_address.h"

namespace presync {
namespace {

class LocalApiTest : public ::testing::Test {
 protected:
  LocalApiTest() {
    char name[] = "/tmp/presync-local-api-XXXXXX";
    folder_ = ::mkdtemp(name);
    path_ = folder_ + "/sock";
    listener_ = UniqueFd(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0));
    const sockaddr_un address = *UnixAddress(path_);
    EXPECT_EQ(::bind(listener_.get(), Raw(address), sizeof(address)), 0);
    EXPECT_EQ(::listen(listener_.get(), 1), 0);
  }
  ~LocalApiTest() override { std::filesystem::remove_all(folder_); }

  // Takes one request, and answers it once `may` is set.
  std::thread Answer(const std::atomic<bool>* may) {
    return std::thread([this, may] {
      const UniqueFd client(::accept(listener_.get(), nullptr, nullptr));
      EXPECT_TRUE(ReadJsonLine(client.get(), MonotonicNow() + absl::Seconds(20)).ok());
      while (!*may) absl::SleepFor(absl::Milliseconds(1));
      WriteJsonLine(client.get(), {{"ok", true}}).IgnoreError();
    });
  }

  std::string folder_, path_;
  UniqueFd listener_;
};

TEST_F(LocalApiTest, AnInterruptionEndsTheWaiting) {
  std::atomic<bool> may = false;
  std::atomic<bool> interrupted = false;
  std::thread server = Answer(&may);
  std::thread person([&] {
    absl::SleepFor(absl::Milliseconds(50));
    interrupted = true;
  });
  const absl::StatusOr<nlohmann::json> answer =
      CallLocal(path_, {{"command", "launch"}}, absl::InfiniteFuture(), &interrupted);
  EXPECT_TRUE(absl::IsCancelled(answer.status())) << answer.status();
  may = true;
  person.join();
  server.join();
}

TEST_F(LocalApiTest, AnAnswerThatTakesLongerThanALookArrives) {
  std::atomic<bool> may = false;
  std::atomic<bool> interrupted = false;
  std::thread server = Answer(&may);
  std::thread later([&] {
    absl::SleepFor(absl::Milliseconds(500));
    may = true;
  });
  const absl::StatusOr<nlohmann::json> answer =
      CallLocal(path_, {{"command", "launch"}}, MonotonicNow() + absl::Seconds(30), &interrupted);
  ASSERT_TRUE(answer.ok()) << answer.status();
  EXPECT_TRUE(FlagOr(*answer, "ok", false));
  later.join();
  server.join();
}

TEST_F(LocalApiTest, TheDeadlineHoldsAllTheSame) {
  std::atomic<bool> may = false;
  std::atomic<bool> interrupted = false;
  std::thread server = Answer(&may);
  const absl::StatusOr<nlohmann::json> answer = CallLocal(
      path_, {{"command", "launch"}}, MonotonicNow() + absl::Milliseconds(300), &interrupted);
  EXPECT_TRUE(absl::IsDeadlineExceeded(answer.status())) << answer.status();
  may = true;
  server.join();
}

}  // namespace
}  // namespace presync
