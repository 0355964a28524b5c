#include "tools/presyncd/fixed_costs.h"

#include <gtest/gtest.h>
#include <stdlib.h>

#include <filesystem>
#include <fstream>
#include <string>

namespace presync {
namespace {

constexpr absl::Duration kExpected = absl::Milliseconds(45);

class FixedCostsTest : public ::testing::Test {
 protected:
  FixedCostsTest() {
    char name[] = "/tmp/presync-fixed-costs-XXXXXX";
    folder_ = ::mkdtemp(name);
  }
  ~FixedCostsTest() override { std::filesystem::remove_all(folder_); }
  std::string path() const { return folder_ + "/fixed-costs.json"; }

  std::string folder_;
};

TEST_F(FixedCostsTest, NothingMeasuredIsWhatIsExpected) {
  EXPECT_EQ(FixedCosts(path()).For("b", kExpected), kExpected);
}

TEST_F(FixedCostsTest, OneDisturbedLaunchChangesNothing) {
  FixedCosts costs(path());
  costs.Learn("b", absl::Milliseconds(700));
  EXPECT_EQ(costs.For("b", kExpected), kExpected);
  for (int i = 0; i < 4; ++i) costs.Learn("b", absl::Milliseconds(30));
  EXPECT_EQ(costs.For("b", kExpected), absl::Milliseconds(30));
  costs.Learn("b", absl::Milliseconds(700));
  EXPECT_EQ(costs.For("b", kExpected), absl::Milliseconds(30));
  EXPECT_EQ(costs.For("c", kExpected), kExpected);
}

TEST_F(FixedCostsTest, AHostThatChangedIsBelievedInTheEnd) {
  FixedCosts costs(path());
  for (int i = 0; i < 20; ++i) costs.Learn("b", absl::Milliseconds(30));
  for (int i = 0; i < 5; ++i) costs.Learn("b", absl::Milliseconds(90));
  EXPECT_EQ(costs.For("b", kExpected), absl::Milliseconds(90));
}

TEST_F(FixedCostsTest, OutlivesARestartAndAFileThatIsDamaged) {
  {
    FixedCosts costs(path());
    for (int i = 0; i < 3; ++i) costs.Learn("b:7350", absl::Milliseconds(30));
  }
  EXPECT_EQ(FixedCosts(path()).For("b:7350", kExpected), absl::Milliseconds(30));
  std::ofstream(path()) << R"({"b:7350": [30000, "x", 30000, 1e99], "c": 7, "d": [[]]})";
  EXPECT_EQ(FixedCosts(path()).For("b:7350", kExpected), absl::Milliseconds(30));
  EXPECT_EQ(FixedCosts(path()).For("c", kExpected), kExpected);
  std::ofstream(path()) << "garbage";
  EXPECT_EQ(FixedCosts(path()).For("b:7350", kExpected), kExpected);
}

}  // namespace
}  // namespace presync
