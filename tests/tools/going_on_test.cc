#include "tools/presyncd/going_on.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <map>
#include <set>
#include <string>
#include <vector>

#include "absl/time/clock.h"

namespace presync {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;

// Tries that come to what the test says, in a presyncd that is not there.
class GoingOnTest : public ::testing::Test {
 protected:
  using Try = GoingOn::Try;

  GoingOnTest()
      : going_on_({.start = [this](const SyncNote& note) { return Start(note.guest); },
                   .log = [this](bool, const std::string& line) { Log(line); },
                   .first_wait = absl::Milliseconds(1),
                   .longest_wait = absl::Milliseconds(4)}) {}
  ~GoingOnTest() override {
    Release();
    going_on_.End();
  }

  void Begin(const std::vector<std::string>& guests) {
    std::vector<SyncNote> notes;
    for (const std::string& guest : guests) {
      notes.push_back({.guest = guest, .order = {{"qmp", "/q"}, {"to", "b:1"}}});
    }
    going_on_.Begin(std::move(notes));
  }
  void Answer(const std::string& guest, Try answer) {
    MutexLock lock(&mutex_);
    answers_[guest] = std::move(answer);
  }
  void Release() {
    MutexLock lock(&mutex_);
    held_.clear();
  }
  void Hold(const std::string& guest) {
    MutexLock lock(&mutex_);
    held_.insert(guest);
  }
  // 20 s: any machine.
  bool AwaitTries(const std::string& guest, int least) {
    MutexLock lock(&mutex_);
    const auto enough = [&] {
      mutex_.AssertHeld();
      return tries_[guest] >= least;
    };
    return mutex_.AwaitWithTimeout(enough, absl::Seconds(20));
  }
  bool AwaitGone(const std::string& guest) {
    for (int i = 0; i < 20'000 && going_on_.Wants(guest); ++i)
      absl::SleepFor(absl::Milliseconds(1));
    return !going_on_.Wants(guest);
  }
  // The log has its first line, which comes after the state.
  bool AwaitLog() {
    for (int i = 0; i < 20'000 && log().empty(); ++i) absl::SleepFor(absl::Milliseconds(1));
    return !log().empty();
  }
  int tries(const std::string& guest) {
    MutexLock lock(&mutex_);
    return tries_[guest];
  }
  std::vector<std::string> log() {
    MutexLock lock(&mutex_);
    return log_;
  }

 private:
  Try Start(const std::string& guest) {
    MutexLock lock(&mutex_);
    ++tries_[guest];
    const auto released = [&] {
      mutex_.AssertHeld();
      return !held_.contains(guest);
    };
    mutex_.Await(released);
    return answers_[guest];
  }
  void Log(const std::string& line) {
    MutexLock lock(&mutex_);
    log_.push_back(line);
  }

  Mutex mutex_;
  std::map<std::string, Try> answers_ ABSL_GUARDED_BY(mutex_);
  std::map<std::string, int> tries_ ABSL_GUARDED_BY(mutex_);
  std::set<std::string> held_ ABSL_GUARDED_BY(mutex_);
  std::vector<std::string> log_ ABSL_GUARDED_BY(mutex_);

 protected:
  GoingOn going_on_;
};

TEST_F(GoingOnTest, WhatGoesOnIsNotItsMatterAnyMore) {
  Begin({"a"});
  ASSERT_TRUE(AwaitGone("a"));
  EXPECT_EQ(tries("a"), 1);
  EXPECT_THAT(going_on_.status(), IsEmpty());
  EXPECT_FALSE(going_on_.Forget("a"));
  EXPECT_THAT(log(), IsEmpty());
}

TEST_F(GoingOnTest, WhatFailsIsTriedUntilItGoesOnAndSaidOnce) {
  Answer("a", {.status = absl::UnavailableError("no libvirtd answers")});
  Begin({"a"});
  ASSERT_TRUE(AwaitTries("a", 5));
  const std::vector<SessionStatus> all = going_on_.status();
  ASSERT_EQ(all.size(), 1u);
  EXPECT_EQ(all[0].state, SessionState::kConnecting);
  EXPECT_EQ(all[0].guest, "a");
  EXPECT_EQ(all[0].peer, "b:1");
  EXPECT_EQ(all[0].guest_address, "/q");
  EXPECT_EQ(all[0].problem, "no libvirtd answers");
  EXPECT_THAT(log(), ElementsAre(HasSubstr("no libvirtd answers")));
  Answer("a", {});
  EXPECT_TRUE(AwaitGone("a"));
  EXPECT_THAT(going_on_.status(), IsEmpty());
}

TEST_F(GoingOnTest, WhatCannotGoOnIsReportedUntilAPersonHasSeenIt) {
  Answer("a", {.status = absl::NotFoundError("its QEMU has ended"), .for_good = true});
  Begin({"a"});
  ASSERT_TRUE(AwaitGone("a"));
  const std::vector<SessionStatus> all = going_on_.status();
  ASSERT_EQ(all.size(), 1u);
  EXPECT_EQ(all[0].state, SessionState::kFailed);
  EXPECT_EQ(all[0].problem, "its QEMU has ended");
  ASSERT_TRUE(AwaitLog());
  EXPECT_THAT(log(), ElementsAre(HasSubstr("its QEMU has ended")));
  EXPECT_TRUE(going_on_.Forget("a"));
  EXPECT_THAT(going_on_.status(), IsEmpty());
  EXPECT_EQ(tries("a"), 1);
}

TEST_F(GoingOnTest, OneThatHangsDelaysNoOther) {
  Hold("hangs");
  Begin({"a", "hangs", "z"});
  EXPECT_TRUE(AwaitGone("a"));
  EXPECT_TRUE(AwaitGone("z"));
  ASSERT_TRUE(AwaitTries("hangs", 1));
  EXPECT_TRUE(going_on_.Wants("hangs"));
  ASSERT_EQ(going_on_.status().size(), 1u);
  EXPECT_THAT(going_on_.status()[0].problem, HasSubstr("being started again"));
}

TEST_F(GoingOnTest, WhatIsForgottenWhileItIsTriedStaysForgotten) {
  Answer("a", {.status = absl::UnavailableError("no")});
  Hold("a");
  Begin({"a"});
  ASSERT_TRUE(AwaitTries("a", 1));
  EXPECT_TRUE(going_on_.Forget("a"));
  EXPECT_FALSE(going_on_.Wants("a"));
  Release();
  going_on_.End();
  EXPECT_EQ(tries("a"), 1);
  EXPECT_THAT(going_on_.status(), IsEmpty());
  EXPECT_THAT(log(), IsEmpty());
}

TEST_F(GoingOnTest, EndsBetweenTwoTries) {
  Answer("a", {.status = absl::UnavailableError("no")});
  Begin({"a"});
  ASSERT_TRUE(AwaitTries("a", 3));
  going_on_.End();
  const int then = tries("a");
  absl::SleepFor(absl::Milliseconds(20));
  EXPECT_EQ(tries("a"), then);
  EXPECT_FALSE(going_on_.Wants("a"));
}

}  // namespace
}  // namespace presync
