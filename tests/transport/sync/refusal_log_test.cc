#include "transport/sync/refusal_log.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "absl/strings/str_cat.h"

namespace presync {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

class RefusalLogTest : public ::testing::Test {
 protected:
  std::vector<std::string> lines_;
  RefusalLog log_{[this](const std::string& line) { lines_.push_back(line); }, absl::Minutes(1)};
  const absl::Time start_ = absl::UnixEpoch();
};

TEST_F(RefusalLogTest, SaysTheSameOnceAndLaterHowOften) {
  for (int i = 0; i < 10'000; ++i) log_.Refuse("10.0.0.9", "no certificate", start_);
  log_.Flush(start_ + absl::Seconds(59));
  EXPECT_THAT(lines_, ElementsAre("refused 10.0.0.9: no certificate"));
  log_.Flush(start_ + absl::Seconds(60));
  EXPECT_THAT(lines_, ElementsAre(HasSubstr("10.0.0.9"), HasSubstr("9999 more times")));
  log_.Refuse("10.0.0.9", "no certificate", start_ + absl::Seconds(61));
  EXPECT_EQ(lines_.size(), 3u);
}

TEST_F(RefusalLogTest, TellsKindsApartButNotWithoutEnd) {
  for (int i = 0; i < 1000; ++i) log_.Refuse(absl::StrCat("10.0.0.", i), "slow", start_);
  EXPECT_EQ(lines_.size(), RefusalLog::kMaxKinds + 1);
  log_.Flush(start_ + absl::Minutes(1));
  EXPECT_THAT(lines_.back(), HasSubstr("others"));
  log_.Refuse("10.0.0.1", "slow", start_ + absl::Minutes(1));
  EXPECT_EQ(lines_.back(), "refused 10.0.0.1: slow");
}

}  // namespace
}  // namespace presync
