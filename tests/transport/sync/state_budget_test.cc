#include "transport/sync/state_budget.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

namespace presync {
namespace {

using ::testing::HasSubstr;

TEST(StateBudget, APeerAndAllHaveTheirLimits) {
  StateBudget budget({.a_peer_bytes = 10, .all_bytes = 15});
  StateBudget::Share one(&budget, "one"), again(&budget, "one"), two(&budget, "two");
  EXPECT_TRUE(one.Take(6).ok());
  EXPECT_TRUE(again.Take(4).ok());
  absl::Status status = again.Take(1);
  EXPECT_EQ(status.code(), absl::StatusCode::kResourceExhausted);
  EXPECT_THAT(status.ToString(), HasSubstr("this peer's guests"));
  EXPECT_TRUE(two.Take(5).ok());
  status = two.Take(1);
  EXPECT_EQ(status.code(), absl::StatusCode::kResourceExhausted);
  EXPECT_THAT(status.ToString(), HasSubstr("all peers"));
  one.GiveBack();
  one.GiveBack();
  EXPECT_TRUE(two.Take(5).ok());
  EXPECT_FALSE(two.Take(1).ok());
  EXPECT_FALSE(one.Take(UINT64_MAX).ok());
  EXPECT_TRUE(one.Take(1).ok());
}

TEST(StateBudget, WhatASessionHeldGoesWithIt) {
  StateBudget budget({.a_peer_bytes = 10, .all_bytes = 10});
  { EXPECT_TRUE(StateBudget::Share(&budget, "").Take(10).ok()); }
  EXPECT_TRUE(StateBudget::Share(&budget, "one").Take(10).ok());
}

}  // namespace
}  // namespace presync
