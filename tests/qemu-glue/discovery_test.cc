#include "qemu-glue/discovery.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/stat.h>
#include <unistd.h>

#include <map>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "qemu-glue/discovery_devices.h"
#include "tests/qemu-glue/fake_qmp_server.h"
#include "tests/qemu-glue/test_qemu.h"
#include "transport/clock.h"

namespace presync {
namespace {

using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;

absl::Time Soon() { return MonotonicNow() + absl::Seconds(60); }

std::vector<std::string> Texts(const Findings& findings) {
  std::vector<std::string> texts;
  for (const Problem& problem : findings.problems) {
    EXPECT_FALSE(problem.remedy.empty()) << problem.what;
    texts.push_back(problem.what);
  }
  return texts;
}

// A monitor whose guest has one flaw of each kind that needs hardware, or another process, to be
// real.
Json FlawedGuest(const std::string& command, const Json& arguments) {
  static const std::map<std::string, Json> answers = {
      {"query-migrate-capabilities", Json::array()},
      {"query-migrate",
       {{"status", "active"}, {"blocked-reasons", {"device X is not migratable", 7}}}},
      {"query-block",
       {{{"device", "disk0"}, {"inserted", {{"cache", {{"direct", false}}}}}},
        {{"device", "disk1"}, {"inserted", {{"cache", {{"direct", true}}}}}},
        {{"device", ""}, {"qdev", "/x/disk2"}, {"inserted", {{"cache", {{"direct", false}}}}}},
        {{"device", "cd0"}}}},
      {"query-named-block-nodes",
       {{{"node-name", "disk0"}, {"drv", "nvme"}},
        {{"node-name", "disk1"}, {"drv", "qcow2"}},
        {{"node-name", "disk2"}, {"drv", "virtio-blk-vhost-user"}}}},
      {"human-monitor-command",
       "net0: index=0,type=nic,model=virtio-net-pci,macaddr=52:54:00:12:34:56\r\n"
       " \\ vhost-user-by-name: index=0,type=tap,ifname=vhost-vdpa0\r\n"
       " \\ hub0: index=0,type=vhost-user,fd=3\r\n"}};
  static const std::map<std::string, Json> trees = {
      {"/machine/peripheral",
       {{{"name", "gpu"}, {"type", "child<vfio-pci>"}},
        {{"name", "share"}, {"type", "child<vhost-user-fs-pci>"}},
        {{"name", "type"}, {"type", "string"}},
        {{"name", "bridge"}, {"type", "child<pcie-root-port>"}}}},
      {"/machine/peripheral/bridge",
       {{{"name", "deep"}, {"type", "child<vhost-vdpa-device-pci>"}},
        {{"name", "host-disks"}, {"type", "child<vhost-scsi-pci>"}},
        {{"name", "sock"}, {"type", "child<vhost-vsock-pci>"}},
        {{"name", "balloon"}, {"type", "child<hv-balloon>"}}}},
      {"/machine/peripheral-anon", {{{"name", "device[0]"}, {"type", "child<virtio-mem-pci>"}}}},
      {"/machine/unattached", {{{"name", "device[3]"}, {"type", "child<ivshmem-plain>"}}}},
      {"/objects", {{{"name", "c"}, {"type", "child<cryptodev-vhost-user>"}}, "nonsense"}}};
  if (command == "qom-list") {
    auto tree = trees.find(StringAt(arguments, "path"));
    return tree == trees.end() ? Json() : tree->second;
  }
  auto answer = answers.find(command);
  return answer == answers.end() ? Json() : answer->second;
}

TEST(Discovery, FindsEveryFlawAtOnce) {
  FakeQmpServer server(AnswerEach(FlawedGuest));
  absl::StatusOr<std::unique_ptr<QmpClient>> qmp = QmpClient::Connect(server.path(), Soon());
  ASSERT_TRUE(qmp.ok()) << qmp.status();
  GuestInfo guest;
  guest.run_state = "inmigrate";
  guest.ram_bytes = 4096;
  guest.backends = {{"pc.ram", "memory-backend-ram", "", 2048, false}};
  absl::StatusOr<Findings> findings = CheckTrackable(**qmp, guest, Soon());
  ASSERT_TRUE(findings.ok()) << findings.status();
  EXPECT_THAT(
      Texts(*findings),
      ElementsAre(
          HasSubstr("incoming migration"), HasSubstr("is a memory-backend-ram"),
          HasSubstr("4096 bytes of RAM, its memory backends 2048"),
          HasSubstr("no migration capability x-ignore-shared"), HasSubstr("under way (active)"),
          HasSubstr("forbids migration: device X is not migratable"),
          HasSubstr("forbids migration: 7"), HasSubstr("vfio-pci (/machine/peripheral/gpu)"),
          HasSubstr("vhost-user-fs-pci"), HasSubstr("vhost-vdpa-device-pci"),
          HasSubstr("vhost-scsi-pci"), HasSubstr("virtio-mem-pci"), HasSubstr("ivshmem-plain"),
          HasSubstr("cryptodev-vhost-user"), HasSubstr("'disk0' (driver nvme)"),
          HasSubstr("'disk2' (driver virtio-blk-vhost-user)"),
          AllOf(HasSubstr("network"), HasSubstr("type=vhost-user"))));
  EXPECT_THAT(findings->notes,
              ElementsAre(HasSubstr("hv-balloon"), HasSubstr("page cache (disk0, /x/disk2)")));
  EXPECT_TRUE(findings->memory_may_be_discarded);
  for (const Problem& problem : findings->problems) {
    const bool device = absl::StrContains(problem.what, "vfio-pci") ||
                        absl::StrContains(problem.what, "driver nvme") ||
                        absl::StrContains(problem.what, "ivshmem");
    EXPECT_TRUE(!device || problem.writes_unseen) << problem.what;
  }
  qmp->reset();
}

TEST(Discovery, SurvivesAnswersOfTheWrongShape) {
  for (const Json& odd :
       {Json(7), Json("text"), Json::array({1, "x", Json::object()}), Json::object(), Json(true),
        Json({{"status", 3}, {"blocked-reasons", 5}})}) {
    FakeQmpServer server(AnswerEach([&odd](const std::string&, const Json&) { return odd; }));
    absl::StatusOr<std::unique_ptr<QmpClient>> qmp = QmpClient::Connect(server.path(), Soon());
    ASSERT_TRUE(qmp.ok()) << qmp.status();
    EXPECT_FALSE(DescribeGuest(**qmp, Soon()).ok());
    EXPECT_TRUE(CheckTrackable(**qmp, GuestInfo(), Soon()).ok()) << ToText(odd);
    EXPECT_FALSE(CheckTarget(**qmp, GuestInfo(), {}, Soon()).ok());
    qmp->reset();
  }
}

TEST(Discovery, StopsAtATreeWithoutEnd) {
  FakeQmpServer server(AnswerEach([](const std::string&, const Json&) {
    Json children = Json::array();
    for (int i = 0; i < 100; ++i)
      children.push_back({{"name", absl::StrCat(i)}, {"type", "child<x>"}});
    return children;
  }));
  absl::StatusOr<std::unique_ptr<QmpClient>> qmp = QmpClient::Connect(server.path(), Soon());
  ASSERT_TRUE(qmp.ok()) << qmp.status();
  absl::Status status = CheckTrackable(**qmp, GuestInfo(), Soon()).status();
  EXPECT_TRUE(absl::IsInvalidArgument(status)) << status;
  qmp->reset();
}

class DiscoveryQemuTest : public ::testing::TestWithParam<QemuVersionUnderTest> {
 protected:
  void SetUp() override {
    if (GetParam().binary.empty()) GTEST_SKIP() << GetParam().skip_reason;
  }

  // Starts a QEMU and looks at it.
  absl::StatusOr<Findings> Look(TestQemuOptions options) {
    qemu_.reset();
    qemu_ =
        std::make_unique<TestQemu>(folder_, GetParam(), absl::StrCat("qemu", ++started_), options);
    qmp_ = qemu_->TakeMonitor();
    absl::StatusOr<GuestInfo> guest = DescribeGuest(*qmp_, Soon());
    if (!guest.ok()) return guest.status();
    guest_ = *guest;
    return CheckTrackable(*qmp_, guest_, Soon());
  }

  std::vector<std::string> ProblemsWith(std::vector<std::string> more, bool default_ram = true) {
    TestQemuOptions options;
    options.default_ram = default_ram;
    options.more = std::move(more);
    absl::StatusOr<Findings> findings = Look(options);
    EXPECT_TRUE(findings.ok()) << findings.status();
    if (!findings.ok()) return {"failed"};
    notes_ = findings->notes;
    return Texts(*findings);
  }

  TestFolder folder_;
  int started_ = 0;
  std::unique_ptr<TestQemu> qemu_;
  std::unique_ptr<QmpClient> qmp_;
  GuestInfo guest_;
  std::vector<std::string> notes_;
};

INSTANTIATE_TEST_SUITE_P(Versions, DiscoveryQemuTest, ::testing::ValuesIn(QemuVersionsUnderTest()),
                         [](const auto& one) { return one.param.label; });

TEST_P(DiscoveryQemuTest, DescribesAGuestThatCanBeMirrored) {
  EXPECT_THAT(ProblemsWith({"-name", "vm1", "-uuid", "11111111-2222-3333-4444-555555555555",
                            "-device", "virtio-balloon-pci", "-netdev", "user,id=n", "-device",
                            "virtio-net-pci,netdev=n,romfile="}),
              IsEmpty());
  EXPECT_EQ(guest_.name, "vm1");
  EXPECT_EQ(guest_.uuid, "11111111-2222-3333-4444-555555555555");
  EXPECT_FALSE(guest_.kvm);
  EXPECT_EQ(guest_.run_state, "running");
  EXPECT_EQ(guest_.ram_bytes, kTestRamBytes);
  EXPECT_GE(guest_.version.major, 7u);
  ASSERT_EQ(guest_.backends.size(), 1u);
  EXPECT_EQ(guest_.backends[0].id, "ram0");
  EXPECT_EQ(guest_.backends[0].path, qemu_->ram_path());
  EXPECT_EQ(guest_.backends[0].size_bytes, kTestRamBytes);
  EXPECT_TRUE(guest_.backends[0].shared);
  EXPECT_THAT(notes_, ElementsAre(HasSubstr("balloon")));
}

TEST_P(DiscoveryQemuTest, TakesTwoBackends) {
  auto object = [this](const std::string& id) {
    return absl::StrCat("memory-backend-file,id=", id,
                        ",size=32M,share=on,mem-path=", folder_.RamPath(id));
  };
  EXPECT_THAT(
      ProblemsWith({"-m", "64M", "-machine", "q35", "-smp", "2", "-object", object("b"), "-object",
                    object("a"), "-numa", "node,memdev=a,cpus=0", "-numa", "node,memdev=b,cpus=1"},
                   false),
      IsEmpty());
  ASSERT_EQ(guest_.backends.size(), 2u);
  EXPECT_EQ(guest_.backends[0].id, "a");
}

TEST_P(DiscoveryQemuTest, RefusesRamThatItCantMirror) {
  EXPECT_THAT(ProblemsWith({"-m", "64M", "-machine", "q35"}, false),
              ElementsAre(HasSubstr("memory-backend-ram")));
  EXPECT_THAT(ProblemsWith({"-m", "64M", "-machine", "q35,memory-backend=m", "-object",
                            "memory-backend-memfd,id=m,size=64M,share=on"},
                           false),
              ElementsAre(HasSubstr("memory-backend-memfd")));
  auto with_file = [this](const std::string& rest) {
    return ProblemsWith({"-m", "64M", "-machine", "q35,memory-backend=m", "-object",
                         "memory-backend-file,id=m,size=64M," + rest},
                        false);
  };
  EXPECT_THAT(with_file("share=off,mem-path=" + folder_.RamPath("m")),
              ElementsAre(HasSubstr("mapped privately")));
  EXPECT_THAT(with_file("share=on,mem-path=" + folder_.RamPath("")),
              ElementsAre(HasSubstr("not a file")));
  EXPECT_THAT(with_file("share=on,mem-path=" + folder_.Path("m")),
              ElementsAre(HasSubstr("neither tmpfs nor hugetlbfs")));
}

TEST_P(DiscoveryQemuTest, RefusesWhatWritesUnseen) {
  const std::string spare = absl::StrCat("memory-backend-file,id=spare,size=64M,share=on,mem-path=",
                                         folder_.RamPath("spare"));
  EXPECT_THAT(ProblemsWith({"-object", spare}),
              ElementsAre(HasSubstr("some backend is not guest RAM")));
  EXPECT_THAT(ProblemsWith({"-object", spare, "-device", "ivshmem-plain,memdev=spare"}),
              testing::Contains(HasSubstr("ivshmem-plain")));
}

TEST_P(DiscoveryQemuTest, SeesThatAMigrationIsUnderWay) {
  ASSERT_THAT(ProblemsWith({}), IsEmpty());
  const Json pause = {
      {"capabilities", {{{"capability", "pause-before-switchover"}, {"state", true}}}}};
  ASSERT_TRUE(qmp_->Execute("migrate-set-capabilities", pause, Soon()).ok());
  ASSERT_TRUE(qmp_->Execute("migrate", {{"uri", "exec:cat >/dev/null"}}, Soon()).ok());
  absl::StatusOr<Findings> findings = CheckTrackable(*qmp_, guest_, Soon());
  ASSERT_TRUE(findings.ok()) << findings.status();
  EXPECT_THAT(Texts(*findings), ElementsAre(HasSubstr("a migration of this guest is under way")));
}

TEST_P(DiscoveryQemuTest, ChecksATarget) {
  const std::vector<RamBackend> source = {{"ram0", "", "/elsewhere", kTestRamBytes, true}};
  TestQemuOptions options;
  options.target = true;
  options.stopped = true;
  absl::StatusOr<Findings> as_source = Look(options);
  ASSERT_TRUE(as_source.ok()) << as_source.status();
  EXPECT_THAT(Texts(*as_source), ElementsAre(HasSubstr("waits for an incoming migration")));
  absl::StatusOr<Findings> good = CheckTarget(*qmp_, guest_, source, Soon());
  ASSERT_TRUE(good.ok()) << good.status();
  EXPECT_THAT(Texts(*good), IsEmpty());
  ASSERT_TRUE(Look({}).ok());
  absl::StatusOr<Findings> bad =
      CheckTarget(*qmp_, guest_, {{{"ram0", "", "", 4096, true}}}, Soon());
  ASSERT_TRUE(bad.ok()) << bad.status();
  EXPECT_THAT(Texts(*bad), ElementsAre(HasSubstr("'running', not waiting"),
                                       HasSubstr("'ram0' of 4096"), HasSubstr("without -S")));
}

}  // namespace
}  // namespace presync
