#include "qemu-glue/libvirt/domain_xml.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <string>

#include "absl/strings/str_cat.h"

namespace presync {
namespace {

using ::testing::HasSubstr;
using ::testing::IsEmpty;
using ::testing::Not;

constexpr char kUuid[] = "6d1e3a52-7c0b-4f55-9b0a-0a5e5f1c2d3e";
constexpr char kPlugin[] = "/usr/lib/x86_64-linux-gnu/qemu/presync_glue.so";

std::string Domain(const std::string& inside) {
  return std::string("<domain type='kvm' id='7'>\n  <name>web1</name>\n  <uuid>") + kUuid +
         "</uuid>\n  <memory unit='KiB'>262144</memory>\n" + inside +
         "  <devices><emulator>/usr/bin/qemu-system-x86_64</emulator></devices>\n</domain>\n";
}

DomainSockets Sockets() { return SocketsOf("/run/presync/libvirt", kUuid); }

std::string Problems(const std::string& xml) {
  absl::StatusOr<std::vector<Problem>> problems = CheckDomain(xml, Sockets());
  if (!problems.ok()) return std::string(problems.status().message());
  std::string text;
  for (const Problem& problem : *problems) text += problem.what + " -> " + problem.remedy + "\n";
  return text;
}

TEST(DomainXml, NamesAreRead) {
  const absl::StatusOr<DomainNames> names = NamesIn(Domain(""));
  ASSERT_TRUE(names.ok()) << names.status();
  EXPECT_EQ(names->name, "web1");
  EXPECT_EQ(names->uuid, kUuid);
  EXPECT_EQ(names->id, "7");
}

TEST(DomainXml, WhatIsNoDomainIsRefused) {
  for (const char* text : {"", "<domain", "<network><name>x</name></network>", "<domain/>"}) {
    EXPECT_TRUE(absl::IsInvalidArgument(NamesIn(text).status())) << text;
  }
  EXPECT_FALSE(CheckDomain("<domain", Sockets()).ok());
  EXPECT_FALSE(AddPresync("no XML", Sockets(), kPlugin).ok());
}

TEST(DomainXml, SaysAllThatIsMissing) {
  const std::string text = Problems(Domain(""));
  EXPECT_THAT(text, HasSubstr("in no file"));
  EXPECT_THAT(text, HasSubstr("private"));
  EXPECT_THAT(text, HasSubstr("plug-in"));
  EXPECT_THAT(text, HasSubstr("monitor"));
  EXPECT_THAT(text, HasSubstr("presync libvirt xml"));
}

TEST(DomainXml, MemfdAndHugePagesAreRefusedWithTheReason) {
  EXPECT_THAT(Problems(Domain("<memoryBacking><source type='memfd'/></memoryBacking>")),
              HasSubstr("memfd"));
  const std::string huge = Domain("<memoryBacking><hugepages/></memoryBacking>");
  EXPECT_THAT(Problems(huge), HasSubstr("whole huge pages"));
  EXPECT_TRUE(absl::IsFailedPrecondition(AddPresync(huge, Sockets(), kPlugin).status()));
}

TEST(DomainXml, WhatIsAddedIsAllThatWasMissing) {
  const absl::StatusOr<std::string> xml = AddPresync(Domain(""), Sockets(), kPlugin);
  ASSERT_TRUE(xml.ok()) << xml.status();
  EXPECT_THAT(Problems(*xml), IsEmpty());
  EXPECT_THAT(*xml, HasSubstr("<emulator>/usr/bin/qemu-system-x86_64</emulator>"));
  EXPECT_THAT(*xml, HasSubstr("xmlns:qemu=\"http://libvirt.org/schemas/domain/qemu/1.0\""));
}

TEST(DomainXml, AddingTwiceIsAddingOnceAndKeepsWhatIsOthers) {
  const std::string others = Domain(
      "<memoryBacking><source type='memfd'/><nosharepages/></memoryBacking>\n"
      "<qemu:commandline xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'>"
      "<qemu:arg value='-device'/><qemu:arg value='pvpanic'/></qemu:commandline>");
  const absl::StatusOr<std::string> once = AddPresync(others, Sockets(), "/old/presync_glue.so");
  ASSERT_TRUE(once.ok());
  const absl::StatusOr<std::string> twice = AddPresync(*once, Sockets(), kPlugin);
  ASSERT_TRUE(twice.ok());
  EXPECT_EQ(*AddPresync(*twice, Sockets(), kPlugin), *twice);
  EXPECT_THAT(*twice, HasSubstr("pvpanic"));
  EXPECT_THAT(*twice, HasSubstr("nosharepages"));
  EXPECT_THAT(*twice, Not(HasSubstr("memfd")));
  EXPECT_THAT(*twice, Not(HasSubstr("/old/")));
  EXPECT_THAT(Problems(*twice), IsEmpty());
}

TEST(DomainXml, AnothersSocketIsNotThisDomains) {
  const DomainSockets other =
      SocketsOf("/run/presync/libvirt", "11111111-2222-3333-4444-555555555555");
  const absl::StatusOr<std::string> xml = AddPresync(Domain(""), other, kPlugin);
  ASSERT_TRUE(xml.ok());
  EXPECT_THAT(Problems(*xml), HasSubstr("plug-in"));
}

// A domain goes on with the names in its XML until it is given new ones.
TEST(DomainXml, SocketsAreThoseThatTheXmlNames) {
  const std::string folder = "/run/presync/libvirt";
  EXPECT_EQ(Sockets().glue, absl::StrCat(folder, "/libvirt-", kUuid, ".glue"));
  const DomainSockets old = OldSocketsOf(folder, kUuid);
  EXPECT_EQ(old.stream, absl::StrCat(folder, "/", kUuid, ".stream"));
  const absl::StatusOr<std::string> before = AddPresync(Domain(""), old, kPlugin);
  ASSERT_TRUE(before.ok());
  EXPECT_EQ(SocketsIn(*before, folder, kUuid).qmp, old.qmp);
  const absl::StatusOr<std::string> after = AddPresync(*before, Sockets(), kPlugin);
  ASSERT_TRUE(after.ok());
  EXPECT_THAT(*after, Not(HasSubstr(old.qmp)));
  EXPECT_EQ(SocketsIn(*after, folder, kUuid).qmp, Sockets().qmp);
  EXPECT_EQ(SocketsIn(Domain(""), folder, kUuid).qmp, Sockets().qmp);
  EXPECT_EQ(SocketsIn("no XML", folder, kUuid).qmp, Sockets().qmp);
}

TEST(DomainXml, ElementsForAPersonHaveThePaths) {
  const std::string text = PresyncElements(Sockets(), kPlugin);
  for (const std::string& path : {Sockets().qmp, Sockets().glue, std::string(kPlugin)}) {
    EXPECT_THAT(text, HasSubstr(path));
  }
}

}  // namespace
}  // namespace presync
