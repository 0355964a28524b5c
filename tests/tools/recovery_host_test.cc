// When recovery takes a QEMU for gone.
#include <gtest/gtest.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstring>
#include <filesystem>
#include <string>

#include "absl/time/clock.h"
#include "qemu-glue/qmp/listener.h"
#include "tools/presyncd/recovery.h"

namespace presync {
namespace {

// A process that takes every connection and closes it at once, until it is killed.
class ClosingMonitor {
 public:
  ClosingMonitor() {
    char name[] = "/tmp/presync-recovery-host-XXXXXX";
    folder_ = ::mkdtemp(name);
    child_ = ::fork();
    if (child_ == 0) Serve();
    while (!ListenerLives(path())) absl::SleepFor(absl::Milliseconds(1));
  }
  ~ClosingMonitor() {
    if (child_ > 0) End();
    std::filesystem::remove_all(folder_);
  }
  // It stays a zombie until it is reaped.
  void Kill() {
    ::kill(child_, SIGKILL);
    siginfo_t info;
    ::waitid(P_PID, static_cast<id_t>(child_), &info, WEXITED | WNOWAIT);
  }
  void End() {
    ::kill(child_, SIGKILL);
    ::waitpid(child_, nullptr, 0);
    child_ = -1;
  }
  std::string path() const { return folder_ + "/qmp"; }

 private:
  void Serve() const {
    sockaddr_un address = {};
    address.sun_family = AF_UNIX;
    std::strcpy(address.sun_path, path().c_str());  // NOLINT: it fits
    const int listener = ::socket(AF_UNIX, SOCK_STREAM, 0);
    if (::bind(listener, reinterpret_cast<sockaddr*>(&address), sizeof(address)) != 0) ::_exit(1);
    if (::listen(listener, 8) != 0) ::_exit(1);
    while (true) ::close(::accept(listener, nullptr, nullptr));
  }

  std::string folder_;
  pid_t child_ = -1;
};

// Taken for gone its record was removed, and a guest that a handover had stopped stood for ever.
TEST(QemuRecoveryHostTest, AMonitorThatClosesIsNoQemuThatHasEnded) {
  ClosingMonitor monitor;
  QemuRecoveryHost host(nullptr, {});
  HandoverEntry entry;
  entry.detail = monitor.path();
  EXPECT_TRUE(absl::IsAborted(host.ResumeSource(entry))) << host.ResumeSource(entry);
  EXPECT_TRUE(absl::IsAborted(host.QuitSource(entry)));
  monitor.Kill();
  EXPECT_TRUE(host.ResumeSource(entry).ok()) << "a zombie has ended";
  monitor.End();
  EXPECT_TRUE(host.ResumeSource(entry).ok());
  EXPECT_TRUE(host.QuitSource(entry).ok());
  entry.detail += "-that-never-was";
  EXPECT_TRUE(host.ResumeSource(entry).ok());
}

}  // namespace
}  // namespace presync
