#include "qemu-glue/dirty_log/guest_maps.h"

#include <sys/sysmacros.h>

#include <string>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace presync {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

constexpr char kUnrelated[] =
    "55d0c0a00000-55d0c0a28000 r--p 00000000 fe:01 1234                       /usr/bin/qemu\n"
    "7f0000000000-7f0000001000 rw-p 00000000 00:00 0 \n";

RegionFile Ram(ino_t inode, PageRun run) {
  RegionFile region;
  region.name = "pc.ram";
  region.device = makedev(0, 0x1a);
  region.inode = inode;
  region.run = run;
  return region;
}

TEST(FindSegments, OneMapping) {
  const auto found = FindSegments(
      std::string(kUnrelated) + "7f1000000000-7f1000010000 rw-s 00000000 00:1a 77   /dev/shm/a b\n",
      {Ram(77, {0, 16})});
  ASSERT_TRUE(found.ok()) << found.status();
  EXPECT_THAT(*found, ElementsAre(Segment{0x7f1000000000, {0, 16}, 0}));
}

TEST(FindSegments, TwoRegionsAndAdjacentPiecesInAnyOrder) {
  // The second region's file lies in three pieces: two side by side, the third below them.
  const auto found =
      FindSegments(std::string(kUnrelated) +
                       "7f0fff000000-7f0fff002000 rw-s 00004000 00:1a 78 /dev/shm/b (deleted)\n"
                       "7f1000000000-7f1000001000 rw-s 00000000 00:1a 77 /dev/shm/a\n"
                       "7f1000008000-7f100000a000 rw-s 00000000 00:1a 78 /dev/shm/b (deleted)\n"
                       "7f100000a000-7f100000c000 rw-s 00002000 00:1a 78 /dev/shm/b (deleted)\n",
                   {Ram(77, {0, 1}), Ram(78, {1, 6})});
  ASSERT_TRUE(found.ok()) << found.status();
  EXPECT_THAT(*found,
              ElementsAre(Segment{0x7f1000000000, {0, 1}, 0}, Segment{0x7f1000008000, {1, 4}, 1},
                          Segment{0x7f0fff000000, {5, 2}, 1}));
}

TEST(FindSegments, ReadOnlyMappingsDoNotMatter) {
  const auto found = FindSegments(
      "7f1000000000-7f1000001000 rw-s 00000000 00:1a 77 /a\n"
      "7f2000000000-7f2000001000 r--s 00000000 00:1a 77 /a\n",
      {Ram(77, {0, 1})});
  EXPECT_TRUE(found.ok()) << found.status();
}

struct Refusal {
  const char* maps;
  absl::StatusCode code;
  const char* text;
};

class FindSegmentsRefuses : public ::testing::TestWithParam<Refusal> {};

TEST_P(FindSegmentsRefuses, WithTheReason) {
  const auto found = FindSegments(GetParam().maps, {Ram(77, {0, 2})});
  EXPECT_EQ(found.status().code(), GetParam().code);
  EXPECT_THAT(found.status().message(), HasSubstr(GetParam().text));
}

INSTANTIATE_TEST_SUITE_P(
    Maps, FindSegmentsRefuses,
    ::testing::Values(Refusal{kUnrelated, absl::StatusCode::kNotFound, "not mapped"},
                      Refusal{"7f1000000000-7f1000002000 rw-s 00000000 00:1b 77 /a\n",
                              absl::StatusCode::kNotFound, "not mapped"},
                      Refusal{"7f1000000000-7f1000001000 rw-s 00000000 00:1a 77 /a\n",
                              absl::StatusCode::kNotFound, "at offset 4096"},
                      Refusal{"7f1000000000-7f1000001000 rw-s 00001000 00:1a 77 /a\n",
                              absl::StatusCode::kNotFound, "at offset 0"},
                      Refusal{"7f1000000000-7f1000003000 rw-s 00000000 00:1a 77 /a\n",
                              absl::StatusCode::kFailedPrecondition, "beyond"},
                      Refusal{"7f1000000000-7f1000002000 rw-p 00000000 00:1a 77 /a\n",
                              absl::StatusCode::kFailedPrecondition, "share=on"},
                      Refusal{"7f1000000000-7f1000002000 rw-s 00000000 00:1a 77 /a\n"
                              "7f2000000000-7f2000001000 rw-s 00000000 00:1a 77 /a\n",
                              absl::StatusCode::kFailedPrecondition, "mapped twice"},
                      Refusal{"7f1000000000 rw-s\n", absl::StatusCode::kInvalidArgument,
                              "another form"},
                      Refusal{"7f1000002000-7f1000000000 rw-s 00000000 00:1a 77 /a\n",
                              absl::StatusCode::kInvalidArgument, "another form"}));

}  // namespace
}  // namespace presync
