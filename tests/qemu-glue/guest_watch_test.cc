// A guest that is looked at again and again, at a monitor with a script. With real QEMUs:
// tests/tiny_guests.py.
#include "qemu-glue/guest_watch.h"

#include <fcntl.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <map>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "qemu-glue/ram_file_users.h"
#include "tests/qemu-glue/fake_qmp_server.h"
#include "transport/clock.h"
#include "transport/mutex.h"
#include "transport/unique_fd.h"

namespace presync {
namespace {

using ::testing::AllOf;
using ::testing::Contains;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;

absl::Time Soon() { return MonotonicNow() + absl::Seconds(30); }

// A guest with 1 MiB of RAM in a file of /dev/shm, whose answers a test changes.
class GuestWatchTest : public ::testing::Test {
 protected:
  GuestWatchTest() {
    ram_ = absl::StrCat("/dev/shm/presync-watch-test-", ::getpid());
    file_ = UniqueFd(::open(ram_.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0600));
    EXPECT_EQ(::ftruncate(file_.get(), 1 << 20), 0);
    answers_ = {
        {"query-status", {{"status", "running"}}},
        {"query-block-jobs", Json::array()},
        {"query-name", Json::object()},
        {"query-uuid", Json::object()},
        {"query-kvm", {{"enabled", true}}},
        {"query-memory-size-summary", {{"base-memory", 1 << 20}}},
        {"query-memdev", {{{"id", "ram0"}, {"size", 1 << 20}}}},
        {"query-migrate-capabilities", {{{"capability", "x-ignore-shared"}}}},
        {"query-migrate", Json::object()},
        {"qom-get /machine type", "pc-q35-7.2-machine"},
        {"query-cpus-fast", {{{"qom-path", "/machine/cpu"}}}},
        {"query-named-block-nodes", Json::array()},
        {"query-block", Json::array()},
        {"info network", ""},
        {"info registers -a", "CR4=00000668 EFER=0000000000000d01"},
        {"qom-list /machine/peripheral", Json::array()},
        {"qom-list /machine/peripheral-anon", Json::array()},
        {"qom-list /machine/unattached", Json::array()},
        {"qom-list /objects", {{{"name", "ram0"}, {"type", "child<memory-backend-file>"}}}},
        {"qom-get /objects/ram0 share", true},
        {"qom-get /objects/ram0 mem-path", ram_},
        {"qom-get /machine/cpu vmx", false},
        {"qom-get /machine/cpu svm", false},
    };
    server_ = std::make_unique<FakeQmpServer>([this](FakeQmpConnection& qemu) { Serve(qemu); });
    qmp_ = *QmpClient::Connect(server_->path(), Soon());
  }
  ~GuestWatchTest() override {
    qmp_.reset();
    server_.reset();
    ::unlink(ram_.c_str());
  }

  // As AnswerEach; an event comes before the next answer.
  void Serve(FakeQmpConnection& qemu) {
    qemu.Greet();
    for (Json command = qemu.ReadCommand(); !command.is_null(); command = qemu.ReadCommand()) {
      const Json* arguments = FindMember(command, "arguments");
      std::string key = StringAt(command, "execute");
      for (const char* name : {"path", "property", "command-line"}) {
        const std::string value = arguments == nullptr ? "" : StringAt(*arguments, name);
        if (value.empty()) continue;
        key = name == std::string("command-line") ? value : absl::StrCat(key, " ", value);
      }
      MutexLock lock(&mutex_);
      ++asked_[key];
      for (const std::string& event : std::exchange(events_, {})) qemu.Send(event + "\n");
      const auto it = answers_.find(key);
      if (it == answers_.end() || it->second.is_null()) {
        qemu.Refuse(command, "not in the script");
      } else {
        qemu.Reply(command, it->second);
      }
    }
  }

  void Answer(const std::string& question, Json answer) {
    MutexLock lock(&mutex_);
    answers_[question] = std::move(answer);
  }
  int Asked(const std::string& question) {
    MutexLock lock(&mutex_);
    return asked_[question];
  }
  GuestOutlook Look() { return watch_.Look(*qmp_, Soon()); }
  void Plug(const std::string& type) {
    Answer("qom-list /machine/peripheral", {{{"name", "new"}, {"type", "child<" + type + ">"}}});
    Answer("qom-list /machine/peripheral/new", Json::array());
  }
  // QEMU tells of a device and of its parts.
  void TellDeleted(const std::string& path) {
    MutexLock lock(&mutex_);
    for (const char* part : {"", "/virtio-backend"}) {
      const Json data = {{"path", absl::StrCat(path, part)}};
      events_.push_back(ToText({{"event", "DEVICE_DELETED"}, {"data", data}}));
    }
  }
  void Unplug() { Answer("qom-list /machine/peripheral", Json::array()); }

  std::string ram_;
  UniqueFd file_;
  Mutex mutex_;
  std::map<std::string, Json> answers_ ABSL_GUARDED_BY(mutex_);
  std::map<std::string, int> asked_ ABSL_GUARDED_BY(mutex_);
  std::vector<std::string> events_ ABSL_GUARDED_BY(mutex_);
  std::unique_ptr<FakeQmpServer> server_;
  std::unique_ptr<QmpClient> qmp_;
  GuestWatch watch_{::getpid()};
};

std::string Text(const absl::Status& status) { return std::string(status.message()); }

TEST_F(GuestWatchTest, LooksCloserOnlyWhenTheListsOfDevicesChanged) {
  EXPECT_TRUE(Look().launchable.ok()) << Look().launchable;
  EXPECT_TRUE(Look().launchable.ok());
  EXPECT_EQ(Asked("query-memdev"), 1);
  Plug("virtio-rng-pci");
  EXPECT_TRUE(Look().launchable.ok());
  EXPECT_EQ(Asked("query-memdev"), 2);
}

TEST_F(GuestWatchTest, ADeviceThatWritesUnseenForbidsALaunchAndThenWantsAProof) {
  Look();
  Plug("vhost-user-blk-pci");
  GuestOutlook outlook = Look();
  EXPECT_THAT(Text(outlook.launchable), AllOf(HasSubstr("vhost-user-blk-pci"), HasSubstr("unseen"),
                                              HasSubstr("compared again")));
  EXPECT_EQ(outlook.launchable, outlook.mirrorable);
  EXPECT_FALSE(outlook.was_written_unseen);
  Unplug();
  TellDeleted("/machine/peripheral/new");
  outlook = Look();
  EXPECT_TRUE(outlook.launchable.ok()) << outlook.launchable;
  EXPECT_TRUE(outlook.was_written_unseen);
  EXPECT_FALSE(Look().was_written_unseen) << "said once";
}

TEST_F(GuestWatchTest, ADeviceThatCameAndWentBetweenTwoLooksCountsAsOneThatWroteUnseen) {
  TellDeleted("/machine/peripheral/old");  // before the sync began
  Plug("virtio-rng-pci");
  EXPECT_FALSE(Look().was_written_unseen);
  TellDeleted("/machine/peripheral/new");
  Unplug();
  EXPECT_FALSE(Look().was_written_unseen) << "it was known, and harmless";
  TellDeleted("/machine/peripheral-anon/device[0]");
  EXPECT_TRUE(Look().was_written_unseen);
  EXPECT_FALSE(Look().was_written_unseen);
  Plug("virtio-rng-pci");
  Look();
  TellDeleted("/machine/peripheral/new");
  TellDeleted("/machine/peripheral/new");
  EXPECT_TRUE(Look().was_written_unseen) << "another one by the same name was there meanwhile";
}

TEST_F(GuestWatchTest, MemoryThatCameIsNamed) {
  Look();
  Answer("query-memdev",
         {{{"id", "ram0"}, {"size", 1 << 20}}, {{"id", "ram1"}, {"size", 2 << 20}}});
  Answer("qom-get /objects/ram1 share", true);
  Answer("qom-get /objects/ram1 mem-path", ram_);
  Answer("qom-list /objects", {{{"name", "ram0"}, {"type", "child<memory-backend-file>"}},
                               {{"name", "ram1"}, {"type", "child<memory-backend-file>"}}});
  const GuestOutlook outlook = Look();
  EXPECT_THAT(Text(outlook.launchable),
              AllOf(HasSubstr("then 'ram0' of 1 MiB, now 'ram0' of 1 MiB, 'ram1' of 2 MiB"),
                    HasSubstr("presync start")));
  EXPECT_FALSE(outlook.was_written_unseen);
}

TEST_F(GuestWatchTest, SaysWhyAGuestDoesNotRun) {
  const std::map<std::string, std::string> words = {{"paused", "resume it"},
                                                    {"shutdown", "has shut down"},
                                                    {"guest-panicked", "has panicked"},
                                                    {"io-error", "disk's error"},
                                                    {"suspended", "wake it"},
                                                    {"colo", "'colo'"}};
  for (const auto& [state, word] : words) {
    Answer("query-status", {{"status", state}});
    const GuestOutlook outlook = Look();
    EXPECT_THAT(Text(outlook.launchable), HasSubstr(word)) << state;
    EXPECT_TRUE(outlook.mirrorable.ok());
  }
}

TEST_F(GuestWatchTest, ABlockJobForbidsALaunchUntilItIsOver) {
  Answer("query-block-jobs",
         {{{"device", "bk"}, {"type", "backup"}, {"status", "running"}}, "nonsense"});
  EXPECT_THAT(Text(Look().launchable), AllOf(HasSubstr("'bk' (backup)"), HasSubstr("cancel")));
  Answer("query-block-jobs", {{{"device", "bk"}, {"type", "backup"}, {"status", "concluded"}}});
  EXPECT_TRUE(Look().launchable.ok());
}

TEST_F(GuestWatchTest, AnInnerHypervisorWantsEverythingComparedForEver) {
  EXPECT_THAT(Look().warnings, IsEmpty());
  Answer("qom-get /machine/cpu vmx", true);
  Plug("virtio-rng-pci");  // so that it looks closer
  GuestOutlook outlook = Look();
  EXPECT_THAT(outlook.warnings, ElementsAre(HasSubstr("offers virtualization")));
  EXPECT_FALSE(outlook.compare_all);
  Answer("info registers -a", "CPU#0\nCR4=00002668\nEFER=0000000000000d01\n");
  outlook = Look();
  EXPECT_TRUE(outlook.compare_all);
  EXPECT_THAT(outlook.warnings, Contains(HasSubstr("hypervisor of its own")));
  Answer("info registers -a", "CR4=00000668 EFER=0000000000000d01");
  EXPECT_TRUE(Look().compare_all);
}

TEST_F(GuestWatchTest, KnowsWhatTheGuestIsMadeOf) {
  EXPECT_THAT(Look().shape, Contains(GuestTrait{"machine", "pc-q35-7.2-machine"}));
  Answer("query-block-jobs", nullptr);
  EXPECT_THAT(Look().shape, Contains(GuestTrait{"machine", "pc-q35-7.2-machine"})) << "as before";
}

TEST_F(GuestWatchTest, AMonitorThatFailsSaysNothingNewAboutDevices) {
  Look();
  Plug("ivshmem-plain");
  Look();
  Answer("query-block-jobs", nullptr);
  const GuestOutlook outlook = Look();
  EXPECT_THAT(Text(outlook.launchable), HasSubstr("not in the script"));
  EXPECT_THAT(Text(outlook.mirrorable), HasSubstr("ivshmem"));
}

TEST_F(GuestWatchTest, FindsAnotherProcessThatMapsTheRam) {
  EXPECT_THAT(FindRamFileUsers({ram_}, ::getpid()), IsEmpty());
  int ready[2];
  ASSERT_EQ(::pipe(ready), 0);
  const pid_t child = ::fork();
  if (child == 0) {
    void* mapped = ::mmap(nullptr, 1 << 20, PROT_READ | PROT_WRITE, MAP_SHARED, file_.get(), 0);
    const char word = mapped == MAP_FAILED ? 'x' : '.';
    (void)!::write(ready[1], &word, 1);
    ::pause();
    ::_exit(0);
  }
  char word = 'x';
  ASSERT_EQ(::read(ready[0], &word, 1), 1);
  ASSERT_EQ(word, '.');
  EXPECT_THAT(FindRamFileUsers({ram_}, ::getpid()), IsEmpty()) << "not this QEMU's memory";
  void* const own = ::mmap(nullptr, 1 << 20, PROT_READ | PROT_WRITE, MAP_SHARED, file_.get(), 0);
  ASSERT_NE(own, MAP_FAILED);
  EXPECT_THAT(FindRamFileUsers({ram_}, ::getpid()),
              ElementsAre(AllOf(HasSubstr(absl::StrCat("process ", child)), HasSubstr(ram_))));
  EXPECT_THAT(FindRamFileUsers({ram_}, child), IsEmpty()) << "QEMU itself";
  ::munmap(own, 1 << 20);
  ::kill(child, SIGKILL);
  ::waitpid(child, nullptr, 0);
  ::close(ready[0]);
  ::close(ready[1]);
}

TEST(RamFileUsers, ReadsALineOfTheMap) {
  const std::string line = "7f10a000-7f20a000 rw-s 00001000 00:19 1234      /dev/shm/x";
  EXPECT_TRUE(IsSharedWritable(line, 0, 0x19, 1234));
  EXPECT_FALSE(IsSharedWritable(line, 0, 0x19, 123));
  EXPECT_FALSE(IsSharedWritable(line, 0, 0x18, 1234));
  EXPECT_FALSE(IsSharedWritable("7f10a000-7f20a000 r--s 00001000 00:19 1234 /x", 0, 0x19, 1234));
  EXPECT_FALSE(IsSharedWritable("7f10a000-7f20a000 rw-p 00001000 00:19 1234 /x", 0, 0x19, 1234));
  EXPECT_FALSE(IsSharedWritable("", 0, 0, 0));
}

}  // namespace
}  // namespace presync
