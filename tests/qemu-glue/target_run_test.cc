// What the order to run comes to when QEMU's answers are no QEMU's. This process stands in for it.
#include <errno.h>
#include <gtest/gtest.h>
#include <string.h>
#include <unistd.h>

#include <memory>
#include <string>

#include "qemu-glue/qemu_guest.h"
#include "tests/qemu-glue/fake_qmp_server.h"
#include "transport/clock.h"

namespace presync {
namespace {

// So that /proc says of this process what QEMU would have been started with.
void TakeArguments() {
  char* const name = program_invocation_name;  // argv[0] itself
  if (strcmp(name, "q") == 0) return;          // done before, for an earlier test
  ASSERT_GE(strlen(name), 4u);
  memcpy(name, "q\0-S", 5);
}

class TargetRunTest : public ::testing::Test {
 protected:
  TargetRunTest() {
    server_ = std::make_unique<FakeQmpServer>(
        AnswerEach([this](const std::string& command, const Json&) -> Json {
          if (command == "query-cpus-fast") return Json::array({{{"thread-id", ::getpid()}}});
          if (command == "cont") {
            told_ = true;
            return refuses_ ? Json() : Json::object();
          }
          if (command == "query-status" && !told_) return {{"status", "inmigrate"}};
          if (command == "query-status" && !status_.empty()) return {{"status", status_}};
          return Json();
        }));
  }
  absl::Status Run() {
    const absl::Time deadline = MonotonicNow() + absl::Seconds(20);
    auto qmp = QmpClient::Connect(server_->path(), deadline);
    if (!qmp.ok()) return qmp.status();
    auto guest = QemuTargetGuest::Create(*std::move(qmp), deadline);
    return guest.ok() ? (*guest)->Run(deadline) : guest.status();
  }

  bool told_ = false, refuses_ = false;
  std::string status_;
  std::unique_ptr<FakeQmpServer> server_;
};

TEST_F(TargetRunTest, OnlyAnOrderThatWasRefusedIsOne) {
  TakeArguments();
  refuses_ = true;
  EXPECT_TRUE(absl::IsFailedPrecondition(Run()));
}

// It may run: whoever takes that for a refusal lets the source go on, too.
TEST_F(TargetRunTest, AQuestionThatIsRefusedAfterwardsIsNoRefusalToRun) {
  TakeArguments();
  const absl::Status run = Run();
  EXPECT_TRUE(absl::IsInternal(run)) << run;
}

TEST_F(TargetRunTest, AGuestThatStaysPausedIsNoRefusalEither) {
  TakeArguments();
  status_ = "paused";
  const absl::Status run = Run();
  EXPECT_TRUE(absl::IsInternal(run)) << run;
}

}  // namespace
}  // namespace presync
