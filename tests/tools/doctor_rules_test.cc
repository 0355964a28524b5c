// What doctor says of a unit that starts a guest again, and of disks that nothing locks.
#include <gtest/gtest.h>

#include "tools/presync/disk_locks.h"
#include "tools/presync/qemu_users.h"
#include "tools/presync/unit_restart.h"

namespace presync {
namespace {

using Level = Finding::Level;

TEST(UnitRestart, TheUnitIsTheNearestServiceOfTheCgroup) {
  EXPECT_EQ(UnitOf("0::/system.slice/web1.service\n"), "web1.service");
  EXPECT_EQ(UnitOf("1:name=x:/y\n0::/system.slice/qemu@web1.service/vcpu\n"), "qemu@web1.service");
  EXPECT_EQ(UnitOf("0::/user.slice/user-0.slice/session-1.scope\n"), "");
}

// A move that succeeded left two: the unit started the guest again.
TEST(UnitRestart, ARestartThatAsksNobodyIsAProblem) {
  EXPECT_EQ(JudgeUnit("a.service", "Restart=no\nExecCondition=\n").level, Level::kGood);
  for (const char* restart : {"always", "on-failure", "on-abnormal"}) {
    const std::string properties = std::string("Restart=") + restart + "\n";
    const Finding finding = JudgeUnit("a.service", properties + "ExecCondition=\n");
    EXPECT_EQ(finding.level, Level::kProblem) << restart;
    EXPECT_NE(finding.remedy.find("may-start"), std::string::npos);
    EXPECT_EQ(JudgeUnit("a.service", properties + "ExecCondition={ path=/usr/bin/presync ; "
                                                  "argv[]=/usr/bin/presync may-start web1 ; }\n")
                  .level,
              Level::kGood);
  }
}

TEST(QemuUsers, SaysWhoIsNotApart) {
  const auto judge = [](bool apart, bool each, int landlock) {
    return JudgeQemuUsers({{"user", "someone"},
                           {"apart", apart},
                           {"each_its_own", each},
                           {"why_not", "the reason"},
                           {"landlock", landlock}});
  };
  EXPECT_EQ(judge(false, false, 6).at(0).level, Level::kNote);
  EXPECT_NE(judge(false, false, 6).at(0).detail.find("the reason"), std::string::npos);
  EXPECT_EQ(judge(true, false, 6).at(0).level, Level::kNote);
  EXPECT_EQ(judge(true, true, 6).at(0).level, Level::kGood);
  EXPECT_EQ(judge(true, true, 6).size(), 1u);
  EXPECT_EQ(judge(true, true, 0).at(1).what, "Landlock");
  EXPECT_TRUE(JudgeQemuUsers({}).empty()) << "an earlier presyncd says nothing of it";
}

TEST(DiskLocks, SaysWhereNothingLocks) {
  const auto judge = [](const char* driver, bool read_only) {
    return JudgeDisks(Json::array({{{"drv", driver}, {"file", "/x"}, {"ro", read_only}}}));
  };
  EXPECT_EQ(judge("file", false).at(0).level, Level::kGood);
  for (const char* driver : {"host_device", "rbd", "iscsi", "something-new"}) {
    EXPECT_EQ(judge(driver, false).at(0).level, Level::kNote) << driver;
    EXPECT_TRUE(judge(driver, true).empty()) << "nobody writes to it";
  }
  EXPECT_TRUE(judge("qcow2", false).empty()) << "what it lies in is judged";
  EXPECT_TRUE(JudgeDisks(Json("nonsense")).empty());
}

}  // namespace
}  // namespace presync
