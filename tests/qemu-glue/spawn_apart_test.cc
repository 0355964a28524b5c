// Programs that are started apart: whose they are, and what they may not.
#include "qemu-glue/spawn_apart.h"

#include <fcntl.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <set>
#include <string>

#include "absl/strings/str_cat.h"
#include "qemu-glue/qemu_user.h"
#include "transport/unique_fd.h"

namespace presync {
namespace {

using ::testing::HasSubstr;
using ::testing::Not;

// What a shell script says that is started so, once it has ended.
std::string SaidBy(const std::string& script, const std::optional<ProcessUser>& user = {}) {
  int ends[2];
  EXPECT_EQ(::pipe2(ends, O_CLOEXEC), 0);
  const UniqueFd read_end(ends[0]);
  UniqueFd write_end(ends[1]);
  const absl::StatusOr<pid_t> pid = SpawnApart({"sh", "-c", script}, write_end.get(), user);
  EXPECT_TRUE(pid.ok()) << pid.status();
  write_end.reset();
  std::string said;
  char buffer[4096];
  for (ssize_t n; (n = ::read(read_end.get(), buffer, sizeof(buffer))) > 0;) {
    said.append(buffer, static_cast<size_t>(n));
  }
  if (pid.ok()) ::waitpid(*pid, nullptr, 0);
  return said;
}

TEST(SpawnApart, SaysWhatCouldNotBeRun) {
  const UniqueFd null(::open("/dev/null", O_WRONLY | O_CLOEXEC));
  const absl::Status status = SpawnApart({"/no/such/qemu"}, null.get(), {}).status();
  EXPECT_TRUE(absl::IsNotFound(status)) << status;
  EXPECT_THAT(std::string(status.message()), HasSubstr("run /no/such/qemu"));
  EXPECT_EQ(::waitpid(-1, nullptr, WNOHANG), -1) << "its process is reaped";
}

TEST(SpawnApart, GetsNoRightsByExecutingAFile) {
  EXPECT_THAT(SaidBy("cat /proc/self/status"), HasSubstr("NoNewPrivs:\t1\n"));
}

TEST(SpawnApart, HasTheThreeDescriptorsOnly) {
  const UniqueFd leak(::open("/dev/null", O_RDONLY));  // not close-on-exec
  ASSERT_TRUE(leak.valid());
  const std::string script =
      "for n in $(seq 0 200); do [ ! -e /proc/$$/fd/$n ] || echo -n \"$n \"; done";
  EXPECT_EQ(SaidBy(script), "0 1 2 ");
}

TEST(SpawnApart, LooksIntoNoOtherProcessAndSignalsNone) {
  if (LandlockVersion() == 0) GTEST_SKIP() << "this kernel has no Landlock";
  const std::string look = absl::StrCat(": < /proc/", ::getpid(), "/mem && echo looked");
  EXPECT_THAT(SaidBy(look), Not(HasSubstr("looked")));
  EXPECT_THAT(SaidBy(": < /proc/$$/mem && echo looked"), HasSubstr("looked"));
  EXPECT_THAT(SaidBy("sleep 100 & kill $! && echo ended its own"), HasSubstr("ended its own"));
  if (LandlockVersion() < 6) GTEST_SKIP() << "this kernel's Landlock knows no signals";
  EXPECT_THAT(SaidBy(absl::StrCat("kill -0 ", ::getpid(), " && echo signalled")),
              Not(HasSubstr("signalled")));
}

TEST(SpawnApart, StillMovesFilesBetweenFolders) {
  EXPECT_THAT(SaidBy("a=$(mktemp -d) && mkdir $a/b && echo x > $a/c && mv -T $a/c $a/b/c && "
                     "ln $a/b/c $a/c && rm -r $a && echo moved"),
              HasSubstr("moved"));
}

TEST(SpawnApart, RunsAsTheUserThatItIsTold) {
  if (::geteuid() != 0) GTEST_SKIP() << "needs root";
  const std::string said =
      SaidBy("cat /proc/self/status", ProcessUser{64211, 64212, {64213, 64214}});
  EXPECT_THAT(said, HasSubstr("Uid:\t64211\t64211\t64211\t64211\n"));
  EXPECT_THAT(said, HasSubstr("Gid:\t64212\t64212\t64212\t64212\n"));
  EXPECT_THAT(said, HasSubstr("Groups:\t64213 64214"));
  for (const char* set : {"CapInh", "CapPrm", "CapEff", "CapAmb"}) {
    EXPECT_THAT(said, HasSubstr(absl::StrCat(set, ":\t0000000000000000\n")));
  }
}

TEST(QemuUsers, AFormThatMeansNothingIsRefused) {
  EXPECT_TRUE(CheckQemuUsers({.user = "auto", .groups = {}}, 3).ok());
  EXPECT_TRUE(CheckQemuUsers({.user = "vm-host", .groups = {}}, 3).ok());
  EXPECT_TRUE(CheckQemuUsers({.user = "64200-64202", .groups = {}}, 3).ok());
  for (const char* user : {"", "0-100", "64202-64200", "64200-64201"}) {
    EXPECT_TRUE(absl::IsInvalidArgument(CheckQemuUsers({.user = user, .groups = {}}, 3))) << user;
  }
}

TEST(QemuUsers, WhatTheHostLacksIsNamed) {
  const auto error = [](QemuUserConfig config) {
    return std::string(QemuUsers::Create(config, {}).status().message());
  };
  EXPECT_THAT(error({.user = "no-such-user-x", .groups = {}}),
              HasSubstr("no user 'no-such-user-x'"));
  EXPECT_THAT(error({.user = "own", .groups = {"no-such-group-x"}}), HasSubstr("no-such-group-x"));
  const absl::StatusOr<QemuUsers> own = QemuUsers::Create({.user = "own", .groups = {}}, {});
  ASSERT_TRUE(own.ok()) << own.status();
  EXPECT_FALSE(own->apart());
  EXPECT_EQ(own->Choose("g", {}).value(), std::nullopt);
}

TEST(QemuUsers, EachGuestHasANumberOfItsOwn) {
  const absl::StatusOr<QemuUsers> users =
      QemuUsers::Create({.user = "64200-64203", .groups = {"64300"}}, {{"special", "64201"}});
  if (absl::IsPermissionDenied(users.status())) GTEST_SKIP() << users.status();
  ASSERT_TRUE(users.ok()) << users.status();
  EXPECT_TRUE(users->each_its_own());
  std::set<uid_t> taken;
  for (const char* guest : {"a", "b", "c"}) {
    const auto user = users->Choose(guest, taken);
    ASSERT_TRUE(user.ok() && user->has_value()) << user.status();
    EXPECT_EQ((*user)->gid, (*user)->uid);
    EXPECT_NE((*user)->uid, 64201u) << "another guest's by the configuration";
    EXPECT_THAT((*user)->groups, ::testing::ElementsAre(64300u));
    EXPECT_EQ(users->Choose(guest, taken).value()->uid, (*user)->uid);
    EXPECT_TRUE(taken.insert((*user)->uid).second);
  }
  EXPECT_TRUE(absl::IsResourceExhausted(users->Choose("d", taken).status()));
  EXPECT_EQ(users->Choose("special", taken).value()->uid, 64201u);
}

}  // namespace
}  // namespace presync
