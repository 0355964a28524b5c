// The local socket, as other users of the host find it.
#include <gmock/gmock.h>
#include <grp.h>
#include <gtest/gtest.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <filesystem>
#include <string>

#include "tools/common/local_api.h"
#include "tools/presyncd/local_server.h"
#include "transport/clock.h"

namespace presync {
namespace {

using ::testing::HasSubstr;

constexpr uid_t kStranger = 65534;
constexpr char kGroup[] = "daemon";  // every Debian has it

class LocalAccessTest : public ::testing::Test {
 protected:
  LocalAccessTest() {
    char name[] = "/tmp/presync-local-test-XXXXXX";
    folder_ = ::mkdtemp(name);
    ::chmod(folder_.c_str(), 0755);
    path_ = folder_ + "/sock";
  }
  ~LocalAccessTest() override {
    server_.reset();
    std::filesystem::remove_all(folder_);
  }

  void Start(const std::string& group) {
    auto server = LocalServer::Start(path_, *LocalAccess::ForGroup(group),
                                     [](const nlohmann::json&) { return StatusToJson({}); });
    ASSERT_TRUE(server.ok()) << server.status();
    server_ = *std::move(server);
  }

  mode_t Mode() {
    struct stat file = {};
    EXPECT_EQ(::stat(path_.c_str(), &file), 0);
    return file.st_mode & 0777;
  }

  // What a process with these ids is answered: "" for yes.
  std::string AnswerTo(uid_t uid, gid_t gid, gid_t extra) {
    int pipes[2];
    EXPECT_EQ(::pipe(pipes), 0);
    const pid_t child = ::fork();
    if (child == 0) {
      if (::setgroups(1, &extra) != 0 || ::setgid(gid) != 0 || ::setuid(uid) != 0) ::_exit(9);
      const auto answer = CallLocal(path_, {{"command", "x"}}, MonotonicNow() + absl::Seconds(20));
      const std::string text =
          std::string((answer.ok() ? JsonToStatus(*answer) : answer.status()).message());
      ::_exit(::write(pipes[1], text.data(), text.size()) >= 0 ? 0 : 9);
    }
    ::close(pipes[1]);
    std::string text;
    char buffer[1000];
    for (ssize_t n; (n = ::read(pipes[0], buffer, sizeof(buffer))) > 0;) text.append(buffer, n);
    ::close(pipes[0]);
    int status = 0;
    ::waitpid(child, &status, 0);
    EXPECT_EQ(status, 0);
    return text;
  }

  std::string folder_, path_;
  std::unique_ptr<LocalServer> server_;
};

TEST_F(LocalAccessTest, IsItsOwnersAndRoots) {
  if (::geteuid() != 0) GTEST_SKIP() << "becomes other users, which needs root";
  Start("");
  EXPECT_EQ(Mode(), 0600u);
  EXPECT_EQ(AnswerTo(0, 0, 0), "");
  EXPECT_THAT(AnswerTo(kStranger, kStranger, kStranger), HasSubstr("sudo presync"));
  // Also where the file's mode was opened by somebody.
  ::chmod(path_.c_str(), 0666);
  EXPECT_THAT(AnswerTo(kStranger, kStranger, kStranger), HasSubstr("user 65534 may not"));
}

TEST_F(LocalAccessTest, IsItsGroups) {
  if (::geteuid() != 0) GTEST_SKIP() << "becomes other users, which needs root";
  Start(kGroup);
  EXPECT_EQ(Mode(), 0660u);
  const gid_t gid = ::getgrnam(kGroup)->gr_gid;
  EXPECT_EQ(AnswerTo(kStranger, gid, kStranger), "") << "as its first group";
  EXPECT_EQ(AnswerTo(kStranger, kStranger, gid), "") << "as another of its groups";
  ::chmod(path_.c_str(), 0666);
  EXPECT_THAT(AnswerTo(kStranger, kStranger, kStranger), HasSubstr("members of group daemon"));
}

TEST_F(LocalAccessTest, AGroupThatIsNotThereIsAnError) {
  EXPECT_THAT(LocalAccess::ForGroup("no-such-group").status().ToString(), HasSubstr("groupadd"));
}

}  // namespace
}  // namespace presync
