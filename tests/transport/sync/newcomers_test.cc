#include "transport/sync/newcomers.h"

#include <gtest/gtest.h>

#include "absl/strings/str_cat.h"

namespace presync {
namespace {

class NewcomersTest : public ::testing::Test {
 protected:
  // As the service does it. Who had to go; 0: nobody.
  Newcomers::Id Enter(const std::string& address) {
    const auto gone = newcomers_.RoomFor(address);
    if (gone.has_value()) newcomers_.Leave(*gone);
    newcomers_.Enter(++last_, address);
    return gone.value_or(0);
  }

  Newcomers newcomers_{{.all = 12, .a_place = 4, .known_places = 3}};
  Newcomers::Id last_ = 0;
};

TEST(Whereabouts, NetworksAreWhatOneAttackerHas) {
  EXPECT_EQ(WhereaboutsOf("10.1.2.3").place, "10.1.2.3");
  EXPECT_EQ(WhereaboutsOf("10.1.2.3").network, "10.1.2.0/24");
  EXPECT_EQ(WhereaboutsOf("::ffff:10.1.2.3").place, "10.1.2.3") << "one host, whatever it dials";
  EXPECT_EQ(WhereaboutsOf("fd00:1:2:3:4:5:6:7").place, "fd00:1:2:3::/64");
  EXPECT_EQ(WhereaboutsOf("fd00:1:2:3:4:5:6:7").network, "fd00:1:2::/48");
  EXPECT_EQ(WhereaboutsOf("fe80::1%eth0").place, "fe80::/64");
  EXPECT_EQ(WhereaboutsOf("unknown").network, "unknown");
}

TEST_F(NewcomersTest, APlaceThatHasAllItMayLosesItsOldest) {
  for (int i = 0; i < 4; ++i) EXPECT_EQ(Enter("10.0.0.1"), 0u);
  EXPECT_EQ(Enter("10.0.0.1"), 1u);
  EXPECT_EQ(Enter("10.0.0.1"), 2u);
  EXPECT_EQ(Enter("10.0.0.2"), 0u);
}

TEST_F(NewcomersTest, AWholeNetworkOfIpv6IsOnePlace) {
  for (int i = 0; i < 4; ++i) EXPECT_EQ(Enter(absl::StrCat("fd00::", i + 1)), 0u);
  EXPECT_EQ(Enter("fd00::ffff:1"), 1u);
}

TEST_F(NewcomersTest, TheMostCrowdedNetworkMakesRoom) {
  EXPECT_EQ(Enter("192.0.2.1"), 0u);  // the oldest of all, alone where it is
  for (int i = 0; i < 11; ++i) EXPECT_EQ(Enter(absl::StrCat("10.0.0.", i % 3 + 1)), 0u);
  EXPECT_EQ(Enter("198.51.100.1"), 2u);
  // A legitimate host in the attacker's own network is the last to go there.
  EXPECT_EQ(Enter("10.0.0.99"), 3u);
  for (int i = 0; i < 8; ++i) {
    const Newcomers::Id gone = Enter(absl::StrCat("10.0.0.", i % 3 + 1));
    EXPECT_NE(gone, 1u);
    EXPECT_LT(gone, 13u) << "of those who came before";
    EXPECT_NE(gone, 0u);
  }
}

TEST_F(NewcomersTest, AnAttackerWithManyPlacesInOneNetworkCrowdsItAllTheSame) {
  EXPECT_EQ(Enter("2001:db8:1::1"), 0u);
  for (int i = 0; i < 11; ++i) EXPECT_EQ(Enter(absl::StrCat("2001:db8:2:", i, "::1")), 0u);
  for (int i = 0; i < 50; ++i) EXPECT_NE(Enter(absl::StrCat("2001:db8:2:", i, "::2")), 1u);
}

TEST_F(NewcomersTest, StrangersDoNotDisplaceThoseWhoAreKnown) {
  newcomers_.Know("10.0.0.1");
  for (int i = 0; i < 3; ++i) EXPECT_EQ(Enter("10.0.0.1"), 0u);
  for (int i = 0; i < 100; ++i) EXPECT_NE(Enter(absl::StrCat("172.16.", i, ".1")), 1u);
  EXPECT_EQ(newcomers_.RoomFor("10.0.0.1").value_or(0) > 3, true) << "a stranger goes";
}

TEST_F(NewcomersTest, OnlyKnownOnesAreIn) {
  for (const char* place : {"10.0.0.1", "10.0.1.1", "10.0.2.1"}) {
    newcomers_.Know(place);
    for (int i = 0; i < 4; ++i) EXPECT_EQ(Enter(place), 0u);
  }
  EXPECT_EQ(Enter("172.16.0.1"), 1u) << "somebody new must come in, too";
}

TEST_F(NewcomersTest, ForgetsWhoWasSeenLeastLately) {
  for (int i = 0; i < 3; ++i) newcomers_.Know(absl::StrCat("10.0.0.", i));
  newcomers_.Know("10.0.0.0");
  newcomers_.Know("10.0.0.9");
  EXPECT_TRUE(newcomers_.Knows("10.0.0.0"));
  EXPECT_FALSE(newcomers_.Knows("10.0.0.1"));
  EXPECT_TRUE(newcomers_.Knows("10.0.0.9"));
}

TEST_F(NewcomersTest, NobodyIsIn) { EXPECT_FALSE(newcomers_.MakeRoom().has_value()); }

}  // namespace
}  // namespace presync
