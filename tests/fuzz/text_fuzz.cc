// Texts that a person types, and those that the kernel writes: units, addresses, /proc/PID/maps.
// The first byte says which.
#include <vector>

#include "qemu-glue/dirty_log/guest_maps.h"
#include "tests/fuzz/fuzz_input.h"
#include "tools/common/units.h"

namespace presync {
namespace {

void TryUnits(std::string_view rest) {
  const absl::string_view text(rest.data(), rest.size());
  const absl::StatusOr<absl::Duration> duration = ParsePositiveDuration(text);
  if (duration.ok()) {
    FUZZ_REQUIRE(*duration > absl::ZeroDuration() && *duration < absl::InfiniteDuration());
    FUZZ_REQUIRE(!FormatMillis(*duration).empty());
  }
  if (const absl::StatusOr<uint64_t> rate = ParseRate(text); rate.ok()) FormatRate(*rate);
  if (const absl::StatusOr<uint64_t> size = ParseSize(text); size.ok()) FormatBytes(*size);
  const absl::StatusOr<HostAndPort> address = ParseHostPort(text, 7350);
  if (address.ok()) FUZZ_REQUIRE(!address->host.empty() && address->port != 0);
}

// Two regions of 3 and 5 pages: each page is in exactly one segment, or there is none.
void TryMaps(std::string_view maps) {
  std::vector<RegionFile> regions(2);
  regions[0] = {.name = "a", .device = 0x10, .inode = 7, .run = {0, 3}};
  regions[1] = {.name = "b", .device = 0x10, .inode = 8, .run = {3, 5}};
  const absl::StatusOr<std::vector<Segment>> segments = FindSegments(maps, regions);
  if (!segments.ok()) return;
  PageIndex next = 0;
  for (const Segment& segment : *segments) {
    FUZZ_REQUIRE(segment.run.first == next && segment.run.count > 0);
    FUZZ_REQUIRE(segment.address + segment.bytes() > segment.address);
    next = segment.run.end();
  }
  FUZZ_REQUIRE(next == 8);
}

}  // namespace
}  // namespace presync

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  presync::fuzz::FuzzInput input(data, size);
  if (input.Byte() % 2 == 0) {
    presync::TryUnits(input.rest());
  } else {
    presync::TryMaps(input.rest());
  }
  return 0;
}
