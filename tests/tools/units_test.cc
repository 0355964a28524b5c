#include "tools/common/units.h"

#include <gtest/gtest.h>

namespace presync {
namespace {

TEST(Units, RefusesMoreThanFits) {
  EXPECT_FALSE(ParseRate("999999999999999TB").ok());
  EXPECT_FALSE(ParseSize("999999999999999T").ok());
  EXPECT_EQ(*ParseSize("4194304T"), uint64_t{1} << 62);
}

TEST(Units, Rates) {
  EXPECT_EQ(*ParseRate("0"), 0u);
  EXPECT_EQ(*ParseRate("800Mbit"), 100'000'000u);
  EXPECT_EQ(*ParseRate("1Gbit/s"), 125'000'000u);
  EXPECT_EQ(*ParseRate("12.5MB"), 12'500'000u);
  EXPECT_EQ(*ParseRate("1MiB"), 1'048'576u);
  for (const char* bad : {"", "fast", "10", "-1MB", "1XB", "1e99GB", "MB"}) {
    EXPECT_FALSE(ParseRate(bad).ok()) << bad;
  }
}

TEST(Units, Sizes) {
  EXPECT_EQ(*ParseSize("4096"), 4096u);
  EXPECT_EQ(*ParseSize("256M"), uint64_t{256} << 20);
  EXPECT_EQ(*ParseSize("2GiB"), uint64_t{2} << 30);
  EXPECT_FALSE(ParseSize("lots").ok());
}

TEST(Units, Durations) {
  EXPECT_EQ(*ParsePositiveDuration("100ms"), absl::Milliseconds(100));
  for (const char* bad : {"", "0s", "-5ms", "100", "inf", "48h"}) {
    EXPECT_FALSE(ParsePositiveDuration(bad).ok()) << bad;
  }
}

TEST(Units, Addresses) {
  EXPECT_EQ(ParseHostPort("b", 7)->port, 7);
  EXPECT_EQ(ParseHostPort("b:99", 7)->port, 99);
  EXPECT_EQ(ParseHostPort("[fd00::2]:99", 7)->host, "fd00::2");
  EXPECT_EQ(ParseHostPort("fd00::2", 7)->host, "fd00::2");
  for (const char* bad : {"", ":7", "b:0", "b:70000", "b:x", "[fd00::2", "[b]x"}) {
    EXPECT_FALSE(ParseHostPort(bad, 7).ok()) << bad;
  }
}

}  // namespace
}  // namespace presync
