// What QEMU prints of itself, as versions 7.2 and 10.0 do, and what comes of comparing two of them.
// With real QEMUs: tests/tiny_guests.py.
#include "qemu-glue/guest_shape.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <string>

#include "absl/strings/str_cat.h"
#include "tests/qemu-glue/fake_qmp_server.h"
#include "transport/clock.h"

namespace presync {
namespace {

using ::testing::Contains;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using ::testing::UnorderedElementsAre;

MATCHER_P2(Trait, key, value, "") { return arg.key == key && arg.value == value; }

constexpr char kTree[] =
    "bus: main-system-bus\n"
    "  type System\n"
    "  dev: ps2-mouse, id \"\"\n"
    "    gpio-out \"\" 1\n"
    "  dev: q35-pcihost, id \"\"\n"
    "    MCFG = -1 (0xffffffffffffffff)\n"
    "    bus: pcie.0\n"
    "      type PCIE\n"
    "      dev: pcie-root-port, id \"rp1\"\n"
    "        addr = 03.0\n"
    "        class PCI bridge, addr 00:03.0, pci id 1b36:000c (sub 0000:0000)\n"
    "        bus: rp1\n"
    "          type PCIE\n"
    "          dev: virtio-net-pci, id \"\"\n"
    "            addr = 00.0\n"
    "            bus: virtio-bus\n"
    "              type virtio-pci-bus\n"
    "              dev: virtio-net-device, id \"\"\n"
    "                mac = \"52:54:00:12:34:56\"\n"
    "      dev: VGA, id \"\"\n"
    "        vgamem_mb = 16 (0x10)\n"
    "        addr = 02.0\n"
    "  dev: pc-dimm, id \"dimm1\"\n"
    "    addr = 4294967296 (0x100000000)\n"
    "  dev: ps2-mouse, id \"\"\n";

TEST(GuestShape, ReadsTheTreeOfDevices) {
  GuestShape shape;
  AppendDevices(kTree, &shape);
  EXPECT_THAT(shape,
              UnorderedElementsAre(
                  Trait("pci main-system-bus/pcie.0/03.0", "pcie-root-port"),
                  Trait("pci main-system-bus/pcie.0/rp1/00.0", "virtio-net-pci"),
                  Trait("pci main-system-bus/pcie.0/02.0", "VGA"),
                  Trait("device main-system-bus ps2-mouse", "2"),
                  Trait("device main-system-bus q35-pcihost", "1"),
                  Trait("device main-system-bus pc-dimm", "1"),
                  Trait("device main-system-bus/pcie.0/rp1/virtio-bus virtio-net-device", "1")));
}

TEST(GuestShape, ReadsTheRamBlocksOfBothVersions) {
  for (const char* rest : {"", "  0x00007f9c13e00000  rw"}) {
    GuestShape shape;
    AppendRamBlocks(
        absl::StrCat(
            "              Block Name    PSize              Offset               Used      Total\n"
            "   0000:00:02.0/vga.vram    4 KiB  0x0000000004080000 0x0000000001000000 "
            "0x0000000001000000",
            rest,
            "\n"
            "    /rom@etc/acpi/tables    4 KiB  0x0000000005100000 0x0000000000020000 "
            "0x0000000000200000",
            rest, "\n\n"),
        &shape);
    EXPECT_THAT(shape, ElementsAre(Trait("block 0000:00:02.0/vga.vram", "16777216"),
                                   Trait("block /rom@etc/acpi/tables", "up to 2097152")));
  }
}

TEST(GuestShape, SurvivesTextsOfAnyForm) {
  std::string deep;
  for (int i = 0; i < 3000; ++i) absl::StrAppend(&deep, std::string(i * 4, ' '), "bus: b\n");
  for (const std::string& text : {deep, std::string("bus: "), std::string("dev: \ndev: x"),
                                  std::string("        bus: deep\n  dev: a, id\n addr = 01.0"),
                                  std::string("a b c 0x1 0xzz\n a b c 0x1 0xzz 0x"),
                                  std::string(100, '\n'), std::string("\0\xff\n", 3)}) {
    GuestShape shape;
    AppendDevices(text, &shape);
    AppendRamBlocks(text, &shape);
    EXPECT_LT(shape.size(), 5000u);
  }
  for (const Json& odd :
       {Json(7), Json("text"), Json::array({1, "x", Json::object()}), Json::object(), Json(true)}) {
    FakeQmpServer server(AnswerEach([&odd](const std::string&, const Json&) { return odd; }));
    absl::StatusOr<std::unique_ptr<QmpClient>> qmp =
        QmpClient::Connect(server.path(), MonotonicNow() + absl::Seconds(20));
    ASSERT_TRUE(qmp.ok()) << qmp.status();
    EXPECT_TRUE(DescribeShape(**qmp, MonotonicNow() + absl::Seconds(20)).ok()) << ToText(odd);
    qmp->reset();
  }
}

TEST(GuestShape, AQemuThatKnowsNoneOfTheQuestionsHasItsVersionOnly) {
  FakeQmpServer server(AnswerEach([](const std::string&, const Json&) { return Json(); }));
  absl::StatusOr<std::unique_ptr<QmpClient>> qmp =
      QmpClient::Connect(server.path(), MonotonicNow() + absl::Seconds(20));
  ASSERT_TRUE(qmp.ok()) << qmp.status();
  const absl::StatusOr<GuestShape> shape = DescribeShape(**qmp, MonotonicNow() + absl::Seconds(20));
  ASSERT_TRUE(shape.ok()) << shape.status();
  EXPECT_THAT(*shape, ElementsAre(Trait("qemu", "9.1.2")));
  qmp->reset();
}

const GuestShape kGuest = {{"machine", "pc-q35-7.2-machine"},
                           {"qemu", "7.2.22"},
                           {"cpu", "qemu64-x86_64-cpu"},
                           {"cpu word 1/0/EDX", "78bfbff"},
                           {"smp cpus", "2"},
                           {"smp cores", "2"},
                           {"memory max-size", "67108864"},
                           {"block 0000:00:02.0/vga.vram", "16777216"},
                           {"pci pcie.0/02.0", "VGA"},
                           {"device isa.0 i8042", "1"},
                           {"disk /machine/peripheral/d", "8388608"}};

GuestShape With(const std::string& key, const std::string& value) {
  GuestShape shape = kGuest;
  for (GuestTrait& trait : shape) {
    if (trait.key == key) {
      trait.value = value;
      return shape;
    }
  }
  shape.push_back({key, value});
  return shape;
}

GuestShape Without(const std::string& key) {
  GuestShape shape = kGuest;
  std::erase_if(shape, [&](const GuestTrait& trait) { return trait.key == key; });
  return shape;
}

TEST(CompareShapes, LikeFindsNothing) {
  EXPECT_THAT(CompareShapes(kGuest, kGuest).differences, IsEmpty());
  EXPECT_THAT(CompareShapes(kGuest, kGuest).warnings, IsEmpty());
  EXPECT_THAT(CompareShapes(kGuest, {}).differences, IsEmpty()) << "nothing is known";
  EXPECT_THAT(CompareShapes({}, kGuest).differences, IsEmpty());
}

TEST(CompareShapes, NamesWhatALaunchWouldFailOf) {
  const auto difference = [](const GuestShape& target) {
    const ShapeComparison compared = CompareShapes(kGuest, target);
    EXPECT_THAT(compared.warnings, IsEmpty());
    return compared.differences;
  };
  EXPECT_THAT(difference(With("machine", "pc-q35-10.0-machine")),
              ElementsAre("machine type: pc-q35-7.2-machine at the source, pc-q35-10.0-machine on "
                          "the target"));
  EXPECT_THAT(difference(With("smp cpus", "1")), ElementsAre(HasSubstr("smp cpus: 2 at")));
  EXPECT_THAT(difference(With("memory max-size", "1073741824")),
              ElementsAre(HasSubstr("memory max-size")));
  EXPECT_THAT(difference(With("block 0000:00:02.0/vga.vram", "33554432")),
              ElementsAre(HasSubstr("RAM block 0000:00:02.0/vga.vram: 16777216")));
  EXPECT_THAT(difference(With("pci pcie.0/02.0", "bochs-display")),
              ElementsAre(HasSubstr("PCI device at pcie.0/02.0: VGA at")));
  EXPECT_THAT(difference(Without("pci pcie.0/02.0")), ElementsAre(HasSubstr("none on the target")));
  EXPECT_THAT(difference(Without("device isa.0 i8042")), ElementsAre(HasSubstr("i8042")));
}

TEST(CompareShapes, WarnsOfWhatQemuTakesWithoutAWord) {
  const auto warning = [](const GuestShape& target) {
    const ShapeComparison compared = CompareShapes(kGuest, target);
    EXPECT_THAT(compared.differences, IsEmpty());
    return compared.warnings;
  };
  EXPECT_THAT(warning(With("cpu", "max-x86_64-cpu")), ElementsAre(HasSubstr("CPU model")));
  EXPECT_THAT(warning(With("cpu word 1/0/EDX", "1")), ElementsAre(HasSubstr("1 words of CPUID")));
  EXPECT_THAT(warning(With("cpu word 7/0/EBX", "1")), ElementsAre(HasSubstr("1 words of CPUID")));
  EXPECT_THAT(warning(With("smp cores", "1")), ElementsAre(HasSubstr("smp cores")));
  EXPECT_THAT(warning(With("disk /machine/peripheral/d", "4194304")),
              ElementsAre(HasSubstr("8388608 at the source, 4194304 on the target")));
  EXPECT_THAT(warning(With("pci pcie.0/05.0", "virtio-rng-pci")),
              ElementsAre(HasSubstr("none at the source, virtio-rng-pci on the target")));
}

TEST(CompareShapes, LeavesToEachVersionOfQemuWhatComesWithAMachine) {
  GuestShape newer = Without("device isa.0 i8042");
  newer[1] = {"qemu", "10.0.2"};
  newer.push_back({"smp books", "1"});
  const ShapeComparison up = CompareShapes(kGuest, newer);
  EXPECT_THAT(up.differences, IsEmpty());
  EXPECT_THAT(up.warnings, IsEmpty());
  const ShapeComparison down = CompareShapes(newer, kGuest);
  EXPECT_THAT(down.differences, IsEmpty());
  EXPECT_THAT(down.warnings, Contains(HasSubstr("the older 7.2.22")));
}

TEST(CompareShapes, PassesOverKindsThatItDoesNotKnow) {
  EXPECT_THAT(CompareShapes(kGuest, With("colour", "blue")).warnings, IsEmpty());
  EXPECT_THAT(CompareShapes(With("colour", "blue"), kGuest).differences, IsEmpty());
}

}  // namespace
}  // namespace presync
