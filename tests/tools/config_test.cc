#include "tools/presyncd/config.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <string>
#include <vector>

namespace presync {
namespace {

using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::Not;

std::string ErrorOf(const char* text) {
  return std::string(ParseConfig(text, "presyncd.toml").status().message());
}

TEST(Config, AnEmptyFileGivesTheDefaults) {
  const absl::StatusOr<Config> config = ParseConfig("", "presyncd.toml");
  ASSERT_TRUE(config.ok());
  EXPECT_EQ(config->listen_host, "127.0.0.1");
  EXPECT_EQ(config->listen_port, kDefaultPort);
  EXPECT_EQ(config->max_launch_time, absl::Milliseconds(100));
  EXPECT_EQ(config->audit_rate, 4'000'000u);
}

TEST(Config, ReadsEveryKindOfKey) {
  const absl::StatusOr<Config> config = ParseConfig(
      "listen = '[::]:7400'\nmax_guest_memory = '4G'\n[defaults]\nmax_launch_time = '80ms'\n"
      "max_bandwidth = '400Mbit'\ntcp_streams = 2\naudit_rate = '0'\n[guest.a]\ncommand = ['qemu', "
      "'{qmp}']\n"
      "[guest.b]\nattach = '/run/b.qmp'\n",
      "presyncd.toml");
  ASSERT_TRUE(config.ok()) << config.status();
  EXPECT_EQ(config->listen_host, "::");
  EXPECT_EQ(config->max_guest_bytes, uint64_t{4} << 30);
  EXPECT_EQ(config->max_bandwidth, 50'000'000u);
  EXPECT_EQ(config->tcp_streams, 2u);
  EXPECT_EQ(config->audit_rate, 0u);
  EXPECT_EQ(config->guests.at("a").command.size(), 2u);
  EXPECT_EQ(config->guests.at("b").attach_qmp, "/run/b.qmp");
}

TEST(Config, ReadsWhatConcernsRdma) {
  const absl::StatusOr<Config> config = ParseConfig(
      "rdma = false\nrdma_addresses = ['10.1.0.2', '10.2.0.2']\n[defaults]\ntransport = 'rdma'\n"
      "rdma_queue_pairs = 8\nrdma_devices = ['mlx5_0']\nrdma_on_demand_paging = true\n",
      "presyncd.toml");
  ASSERT_TRUE(config.ok()) << config.status();
  EXPECT_FALSE(config->rdma);
  EXPECT_EQ(config->rdma_addresses.size(), 2u);
  EXPECT_EQ(config->transport, "rdma");
  EXPECT_EQ(config->rdma_queue_pairs, 8u);
  EXPECT_EQ(config->rdma_devices, std::vector<std::string>{"mlx5_0"});
  EXPECT_TRUE(config->rdma_on_demand_paging);
  EXPECT_THAT(ErrorOf("rdma = 'yes'"), HasSubstr("true or false"));
  EXPECT_THAT(ErrorOf("rdma_addresses = '10.1.0.2'"), HasSubstr("array"));
  EXPECT_THAT(ErrorOf("[defaults]\nrdma_queue_pairs = 17"), HasSubstr("1 to 16"));
  EXPECT_THAT(ErrorOf("[defaults]\ntransport = 'ib'"), HasSubstr("auto, rdma, tcp"));
}

TEST(Config, ReadsWhoMayDoWhat) {
  const absl::StatusOr<Config> config = ParseConfig(
      "certificate = '/c'\nkey = '/k'\nca = '/a'\nrequire_encryption = true\nmax_guests = 9\n"
      "max_memory = '64G'\nsocket_group = 'ops'\n[peer.\"h1.example\"]\nmax_guests = 2\n"
      "max_memory = '8G'\nguests = ['web-*']\nfolders = ['/dev/shm/presync']\n[peer.h2]\n",
      "presyncd.toml");
  ASSERT_TRUE(config.ok()) << config.status();
  EXPECT_EQ(config->tls.key, "/k");
  EXPECT_EQ(config->everyone.max_guests, 9u);
  EXPECT_EQ(config->everyone.max_memory_bytes, uint64_t{64} << 30);
  EXPECT_EQ(config->socket_group, "ops");
  EXPECT_EQ(config->peers.size(), 2u);
  EXPECT_EQ(config->peers.at("h1.example").max_guests, 2u);
  EXPECT_EQ(config->peers.at("h1.example").folders[0], "/dev/shm/presync");
  EXPECT_THAT(ErrorOf("[peer.h1]\nmax_gests = 1"), HasSubstr("max_gests: no such key"));
}

TEST(Config, RefusesSecurityThatContradictsItself) {
  const std::string tls = "certificate = '/c'\nkey = '/k'\nca = '/a'\n";
  EXPECT_THAT(ErrorOf("certificate = '/c'\nkey = '/k'"), HasSubstr("set all or none"));
  EXPECT_THAT(ErrorOf((tls + "insecure = true").c_str()), HasSubstr("contradict"));
  EXPECT_THAT(ErrorOf("require_encryption = true"), HasSubstr("needs certificate"));
  EXPECT_THAT(ErrorOf("[peer.h1]"), HasSubstr("nobody has a name"));
}

TEST(Config, ReadsWhomQemusRunAs) {
  EXPECT_EQ(ParseConfig("", "f")->qemu.user, "auto");
  const std::string guest = "[guest.g1]\ncommand = ['q', '{qmp}', '{folder}']\nuser = 'vm-g1'\n";
  const absl::StatusOr<Config> config =
      ParseConfig("qemu_user = '64200-64210'\nqemu_groups = ['kvm']\n" + guest, "f");
  ASSERT_TRUE(config.ok()) << config.status();
  EXPECT_EQ(config->qemu.user, "64200-64210");
  EXPECT_EQ(config->qemu.groups, std::vector<std::string>{"kvm"});
  EXPECT_EQ(config->guests.at("g1").user, "vm-g1");
  for (const char* user : {"0-10", "64201-64200", ""}) {
    const absl::Status status =
        ParseConfig(std::string("qemu_user = '") + user + "'\n" + guest, "f").status();
    EXPECT_NE(status.message().find("qemu_user"), std::string::npos) << status;
  }
}

TEST(Config, SaysWhereAndWhatIsWrong) {
  EXPECT_THAT(ErrorOf("listen = 'x'\nlissten = 'y'"), HasSubstr("presyncd.toml:2: lissten"));
  EXPECT_THAT(ErrorOf("listen = "), HasSubstr("presyncd.toml:1"));
  EXPECT_THAT(ErrorOf("log_level = 'loud'"), HasSubstr("debug, info, warn, error"));
  EXPECT_THAT(ErrorOf("[defaults]\ntcp_streams = 99"), HasSubstr("1 to 16"));
  EXPECT_THAT(ErrorOf("[defaults]\nmax_launch_time = 'soon'"), HasSubstr("100ms"));
  EXPECT_THAT(ErrorOf("[guest.a]"), HasSubstr("either command"));
  EXPECT_THAT(ErrorOf("[guest.a]\ncommand = ['a']\nattach = 'b'"), HasSubstr("either command"));
}

TEST(Config, RefusesPathsThatDependOnWhereItIsStarted) {
  for (const std::string key : {"socket", "state_folder", "run_folder", "ram_folder"}) {
    EXPECT_THAT(ErrorOf((key + " = 'here'").c_str()),
                HasSubstr("presyncd.toml: " + key + ": 'here' must be an absolute path"));
  }
}

std::vector<std::string> NotesOf(const std::string& text) {
  const absl::StatusOr<Config> config = ParseConfig(text, "presyncd.toml");
  return config.ok() ? ConfigNotes(*config) : std::vector<std::string>{"bad"};
}

TEST(Config, SaysWhatIsInOrderAndMayNotBeMeant) {
  const std::string tls = "certificate = 'c'\nkey = 'k'\nca = 'a'\n";
  EXPECT_THAT(NotesOf(""), ElementsAre(HasSubstr("no certificates")));
  EXPECT_THAT(NotesOf("trust_this_host = true"), ElementsAre(HasSubstr("any user of this host")));
  EXPECT_THAT(NotesOf("insecure = true"), ElementsAre(HasSubstr("anybody")));
  EXPECT_THAT(NotesOf(tls + "[peer.a]\nguests = ['web-*']"), ElementsAre());
  EXPECT_THAT(NotesOf(tls + "[peer.a]\nguests = ['web-*']\n[peer.b]\nmax_guests = 3"),
              ElementsAre(AllOf(HasSubstr("b may push every guest"), Not(HasSubstr("domain")))));
  EXPECT_THAT(NotesOf(tls + "[libvirt]\n[peer.b]"), ElementsAre(HasSubstr("every domain")));
  EXPECT_THAT(ErrorOf((tls + "trust_this_host = true").c_str()), HasSubstr("contradict"));
}

std::string ErrorOfCommand(const std::string& arguments) {
  return ErrorOf(("[guest.a]\ncommand = [" + arguments + "]\n").c_str());
}

TEST(Config, RefusesGuestsThatCannotWork) {
  EXPECT_EQ(ErrorOfCommand("'q', 'unix:{qmp},server=on', '{glue}', '{name}', '{ram.ram0}'"), "");
  EXPECT_EQ(ErrorOfCommand("'q', '{qmp}', '-blockdev', '{\"driver\": \"null-co\"}'"), "");
  EXPECT_THAT(ErrorOfCommand("'qemu-system-x86_64', '-S'"), HasSubstr("lacks {qmp}"));
  EXPECT_THAT(ErrorOfCommand("'q', '{qmp}', 'mem-path={memory}'"),
              HasSubstr("{memory} in its command means nothing"));
  EXPECT_THAT(ErrorOfCommand("'q', '{qmp}', '{ram.}'"), HasSubstr("{ram.} in its command"));
  EXPECT_THAT(ErrorOfCommand("'q', '{qmp}', '-daemonize'"), HasSubstr("leave it out"));
  const std::string command = "]\ncommand = ['q', '{qmp}']";
  EXPECT_THAT(ErrorOf(("[guest.\".x\"" + command).c_str()),
              HasSubstr("presyncd.toml: [guest.\".x\"]: a guest's name has"));
  EXPECT_THAT(ErrorOf(("[guest.\"a/b\"" + command).c_str()), HasSubstr("a guest's name has"));
  EXPECT_THAT(ErrorOf(("[guest." + std::string(120, 'a') + command).c_str()),
              HasSubstr("of at most 107"));
  EXPECT_EQ(ErrorOf(("[guest." + std::string(60, 'a') + command).c_str()), "");
  EXPECT_THAT(ErrorOf(("[guest.a]\nattach = '/" + std::string(120, 'a') + "'").c_str()),
              HasSubstr("of at most 107"));
}

}  // namespace
}  // namespace presync
