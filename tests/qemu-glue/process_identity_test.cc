#include "qemu-glue/process_identity.h"

#include <gtest/gtest.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

namespace presync {
namespace {

TEST(ProcessIdentity, IsOfOneProcessOnly) {
  const ProcessIdentity self = IdentifyProcess(::getpid());
  ASSERT_TRUE(self.known());
  EXPECT_TRUE(Lives(self));
  ProcessIdentity other = self;
  ++other.start_ticks;
  EXPECT_FALSE(Lives(other)) << "the number was given to another process";
  other = self;
  other.boot = "another boot";
  EXPECT_FALSE(Lives(other)) << "the host was started again";
  EXPECT_FALSE(Lives({}));
  EXPECT_FALSE(IdentifyProcess(0).known());
}

TEST(ProcessIdentity, OneThatEndedDoesNotLiveAlthoughNobodyReapedIt) {
  const pid_t child = ::fork();
  if (child == 0) {
    ::pause();
    ::_exit(0);
  }
  const ProcessIdentity identity = IdentifyProcess(child);
  EXPECT_TRUE(Lives(identity));
  ::kill(child, SIGKILL);
  siginfo_t info = {};
  ASSERT_EQ(::waitid(P_PID, static_cast<id_t>(child), &info, WEXITED | WNOWAIT), 0);
  EXPECT_NE(StartTicks(child), 0u) << "a zombie";
  EXPECT_FALSE(Lives(identity));
  ::waitpid(child, nullptr, 0);
  EXPECT_FALSE(Lives(identity));
}

}  // namespace
}  // namespace presync
