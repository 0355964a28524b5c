// Stock QEMU with the library inside: every way in, both logs. The firmware is the guest.
#include <fcntl.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <string>
#include <vector>

#include "absl/time/clock.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "predictor/bitmap.h"
#include "qemu-glue/dirty_log/probe.h"
#include "tests/qemu-glue/dirty_log/guest_fixture.h"
#include "transport/clock.h"

namespace presync {
namespace {

constexpr PageCount kPages = 64 * 256;  // 64 MB
constexpr uid_t kNobody = 65534;

enum class Way { kPlugin, kPreload, kPreloadDaemonized };

struct QemuCase {
  const char* label;
  bool qemu10 = false;
  Way way = Way::kPlugin;
  bool sandbox = false;
  bool unprivileged = false;
  DirtyLogMode mode = DirtyLogMode::kAuto;
};

std::string StockQemu() {
  for (const char* path : {"/usr/bin/qemu-system-x86_64", "/usr/local/bin/qemu-system-x86_64"}) {
    if (::access(path, X_OK) == 0) return path;
  }
  return "";
}

class QemuDirtyLogTest : public ::testing::TestWithParam<QemuCase> {
 protected:
  ~QemuDirtyLogTest() override {
    std::error_code ignored;
    if (!ram_.empty()) std::filesystem::remove(ram_, ignored);
    if (pid_ > 0) {
      ::kill(pid_, SIGKILL);
      ::waitpid(pid_, nullptr, 0);
    }
    if (daemon_ > 0) ::kill(daemon_, SIGKILL);
  }

  void SetUp() override {
    const QemuCase& c = GetParam();
    if (c.qemu10) {
      const char* path = std::getenv("PRESYNC_QEMU10");
      if (path == nullptr)
        GTEST_SKIP() << "PRESYNC_QEMU10 does not name a QEMU 10 (tools/setup --qemu10)";
      qemu_ = path;
    } else {
      qemu_ = StockQemu();
      ASSERT_FALSE(qemu_.empty()) << "qemu-system-x86_64 is not installed";
    }
    if (::geteuid() != 0 && (c.unprivileged || c.mode == DirtyLogMode::kUffdHandler)) {
      GTEST_SKIP() << "needs root: to run QEMU as another user, or to open /dev/userfaultfd for it";
    }
    MakeFiles();
  }

  // A folder that QEMU's user may use, with a copy of the library; and its RAM on a tmpfs.
  void MakeFiles() {
    library_ = folder_.path() + "/presync_glue.so";
    std::filesystem::copy_file(PRESYNC_GLUE_LIBRARY, library_);
    ram_ = "/dev/shm/presync-test-" + std::to_string(::getpid()) + ".ram";
    const int fd = ::open(ram_.c_str(), O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
    ASSERT_GE(fd, 0) << std::strerror(errno);
    file_.reset(fd);
    ASSERT_EQ(::ftruncate(fd, PagesToBytes(kPages)), 0);
    if (GetParam().unprivileged) {
      ASSERT_EQ(::fchown(fd, kNobody, kNobody), 0);
      ASSERT_EQ(::chown(folder_.path().c_str(), kNobody, kNobody), 0);
      ASSERT_EQ(::chmod(library_.c_str(), 0755), 0);
    }
  }

  std::vector<std::string> CommandLine() const {
    const QemuCase& c = GetParam();
    std::vector<std::string> line;
    if (c.unprivileged) {
      line = {"/usr/bin/setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"};
    }
    if (c.way != Way::kPlugin) {
      line.insert(line.end(),
                  {"/usr/bin/env", "LD_PRELOAD=" + library_, "PRESYNC_GLUE_SOCKET=" + socket()});
    }
    line.insert(line.end(), {qemu_, "-nodefaults", "-display", "none", "-S", "-accel", "tcg"});
    if (c.qemu10) {
      // Unpacked somewhere, it doesn't know where its firmware is.
      const std::string share = std::filesystem::path(qemu_).parent_path().parent_path() / "share";
      line.insert(line.end(), {"-L", share + "/qemu", "-L", share + "/seabios"});
    }
    line.insert(line.end(), {"-m", "64M", "-object",
                             "memory-backend-file,id=ram,size=64M,share=on,mem-path=" + ram_,
                             "-machine", "pc,memory-backend=ram", "-vga", "std"});
    if (c.way == Way::kPlugin) {
      line.insert(line.end(), {"-plugin", library_ + ",socket=" + socket()});
    }
    if (c.way == Way::kPreloadDaemonized) {
      line.insert(line.end(), {"-daemonize", "-pidfile", folder_.path() + "/pid"});
    } else {
      line.insert(line.end(), {"-qmp", "stdio"});
    }
    if (c.sandbox) {
      line.insert(
          line.end(),
          {"-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"});
    }
    return line;
  }

  void StartQemu() {
    std::vector<std::string> line = CommandLine();
    std::vector<char*> argv;
    for (std::string& word : line) argv.push_back(word.data());
    argv.push_back(nullptr);
    int in[2];
    ASSERT_EQ(::pipe2(in, O_CLOEXEC), 0);
    pid_ = ::fork();
    ASSERT_GE(pid_, 0);
    if (pid_ == 0) {
      ::prctl(PR_SET_PDEATHSIG, SIGKILL);
      ::dup2(in[0], STDIN_FILENO);
      const int nowhere = ::open("/dev/null", O_WRONLY);
      ::dup2(nowhere, STDOUT_FILENO);
      ::execv(argv[0], argv.data());
      ::_exit(127);
    }
    ::close(in[0]);
    qmp_.reset(in[1]);
    if (GetParam().way == Way::kPreloadDaemonized) AwaitDaemon();
  }

  // -daemonize: the process that we started ends with 0 when its grandchild is ready.
  void AwaitDaemon() {
    int status = 0;
    ASSERT_EQ(::waitpid(pid_, &status, 0), pid_);
    pid_ = -1;
    ASSERT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 0);
    UniqueFd file(::open((folder_.path() + "/pid").c_str(), O_RDONLY));
    char text[16] = {};
    ASSERT_GT(::read(file.get(), text, sizeof(text) - 1), 0);
    daemon_ = std::atoi(text);
  }

  // QEMU needs a moment until the socket answers and guest RAM is mapped.
  absl::StatusOr<ProbedLog> Probe(DirtyLogMode mode) {
    absl::StatusOr<RegionFile> region = DescribeRegion("ram", file_.get(), {0, kPages});
    EXPECT_TRUE(region.ok());
    const absl::Time deadline = MonotonicNow() + absl::Seconds(60);
    while (true) {
      absl::StatusOr<ProbedLog> probed =
          ProbeDirtyLog({socket(), IdentifyProcess(daemon_ > 0 ? daemon_ : pid_), {*region}, mode});
      const bool retry = absl::IsNotFound(probed.status()) || absl::IsUnavailable(probed.status());
      if (!retry || MonotonicNow() >= deadline) return probed;
      absl::SleepFor(absl::Milliseconds(10));
    }
  }

  std::string socket() const { return folder_.path() + "/glue"; }

  void Qmp(const std::string& line) {
    ASSERT_EQ(::write(qmp_.get(), line.data(), line.size()), static_cast<ssize_t>(line.size()));
  }

  testing::TempFolder folder_;
  std::string qemu_;
  std::string library_;
  std::string ram_;
  UniqueFd file_;
  UniqueFd qmp_;
  pid_t pid_ = -1;
  pid_t daemon_ = -1;
};

TEST_P(QemuDirtyLogTest, ProbesAndSeesTheFirmwareWrite) {
  StartQemu();
  if (HasFatalFailure()) return;
  absl::StatusOr<ProbedLog> probed = Probe(GetParam().mode);
  ASSERT_TRUE(probed.ok()) << probed.status();
  std::vector<PageRun> written;
  ASSERT_TRUE(probed->log->Arm({{0, kPages}}).ok());
  ASSERT_TRUE(probed->log->Peek(&written).ok());
  EXPECT_EQ(CountPages(written), 0u) << "the guest is stopped";
  if (daemon_ > 0) return;  // its monitor is out of reach

  Qmp("{\"execute\":\"qmp_capabilities\"}\n{\"execute\":\"cont\"}\n");
  const absl::Time deadline = MonotonicNow() + absl::Seconds(60);
  while (written.empty()) {
    ASSERT_LT(MonotonicNow(), deadline) << "the firmware wrote nothing";
    ASSERT_TRUE(probed->log->Peek(&written).ok());
  }
  Qmp("{\"execute\":\"quit\"}\n");
  int status = -1;
  ASSERT_EQ(::waitpid(pid_, &status, 0), pid_);
  pid_ = -1;
  EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 0) << status;
  EXPECT_EQ(probed->log->Peek(&written).code(), absl::StatusCode::kUnavailable);
  EXPECT_NE(::access(socket().c_str(), F_OK), 0) << "QEMU removes its socket when it ends";
}

constexpr DirtyLogMode kAsync = DirtyLogMode::kUffdAsync;
constexpr DirtyLogMode kHandler = DirtyLogMode::kUffdHandler;

INSTANTIATE_TEST_SUITE_P(
    Qemu, QemuDirtyLogTest,
    ::testing::Values(
        QemuCase{"PluginAuto"}, QemuCase{"PluginAsync", false, Way::kPlugin, false, false, kAsync},
        QemuCase{"PluginHandler", false, Way::kPlugin, false, false, kHandler},
        QemuCase{"PreloadAsync", false, Way::kPreload, false, false, kAsync},
        QemuCase{"PreloadHandler", false, Way::kPreload, false, false, kHandler},
        QemuCase{"Daemonized", false, Way::kPreloadDaemonized},
        QemuCase{"SandboxedPluginAsync", false, Way::kPlugin, true, true, kAsync},
        QemuCase{"SandboxedPluginHandler", false, Way::kPlugin, true, true, kHandler},
        QemuCase{"SandboxedPreloadAsync", false, Way::kPreload, true, true, kAsync},
        QemuCase{"SandboxedPreloadHandler", false, Way::kPreload, true, true, kHandler},
        QemuCase{"Qemu10PluginAsync", true, Way::kPlugin, false, false, kAsync},
        QemuCase{"Qemu10PluginHandler", true, Way::kPlugin, false, false, kHandler},
        QemuCase{"Qemu10PreloadAsync", true, Way::kPreload, false, false, kAsync},
        QemuCase{"Qemu10SandboxedPluginHandler", true, Way::kPlugin, true, true, kHandler}),
    [](const auto& p) { return p.param.label; });

}  // namespace
}  // namespace presync
