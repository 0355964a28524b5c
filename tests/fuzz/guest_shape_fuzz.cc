// What a QEMU prints of its devices and RAM blocks, a shape that a peer sends, and a line of
// /proc/PID/maps. The first byte says which.
#include "qemu-glue/guest_shape.h"
#include "qemu-glue/ram_file_users.h"
#include "tests/fuzz/fuzz_input.h"

namespace presync {
namespace {

// Comparing anything with itself finds nothing, and with anything else no more than there is.
void Compare(const GuestShape& a, const GuestShape& b) {
  const ShapeComparison same = CompareShapes(a, a);
  FUZZ_REQUIRE(same.differences.empty() && same.warnings.empty());
  const ShapeComparison other = CompareShapes(a, b);
  FUZZ_REQUIRE(other.differences.size() + other.warnings.size() <= a.size() + b.size() + 2);
}

// "key=value" a line.
GuestShape ReadShape(std::string_view text) {
  GuestShape shape;
  while (!text.empty()) {
    const size_t end = std::min(text.find('\n'), text.size());
    const std::string_view line = text.substr(0, end);
    const size_t equals = std::min(line.find('='), line.size());
    shape.push_back({std::string(line.substr(0, equals)),
                     std::string(line.substr(std::min(equals + 1, line.size())))});
    text.remove_prefix(std::min(end + 1, text.size()));
  }
  return shape;
}

}  // namespace
}  // namespace presync

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace presync;  // NOLINT
  fuzz::FuzzInput input(data, size);
  const uint8_t which = input.Byte();
  const std::string_view text = input.rest();
  static const GuestShape guest = {{"machine", "pc-q35-7.2-machine"},
                                   {"qemu", "7.2.22"},
                                   {"cpu", "qemu64-x86_64-cpu"},
                                   {"cpu word 1/0/EDX", "78bfbff"},
                                   {"pci main-system-bus/pcie.0/02.0", "VGA"}};
  GuestShape shape;
  if (which % 4 == 0) {
    AppendDevices(text, &shape);
  } else if (which % 4 == 1) {
    AppendRamBlocks(text, &shape);
  } else if (which % 4 == 2) {
    shape = ReadShape(text);
  } else {
    (void)IsSharedWritable(std::string(text), 0, 0x19, 1234);
  }
  Compare(shape, guest);
  Compare(guest, shape);
  return 0;
}
