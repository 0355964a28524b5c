#include "tests/qemu-glue/dirty_log/guest_fixture.h"

#include <fcntl.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <utility>

#include "qemu-glue/dirty_log/probe.h"

namespace presync::testing {
namespace {

void Require(bool ok, const char* what) {
  if (ok) return;
  std::perror(what);
  std::abort();
}

}  // namespace

TempFolder::TempFolder() {
  char name[] = "/tmp/presync-test-XXXXXX";
  Require(::mkdtemp(name) != nullptr, "mkdtemp");
  path_ = name;
}

TempFolder::~TempFolder() {
  std::error_code ignored;
  std::filesystem::remove_all(path_, ignored);
}

SyntheticGuest::SyntheticGuest(const std::vector<GuestRegionSpec>& specs)
    : socket_(folder_.path() + "/glue") {
  std::vector<std::string> arguments = {PRESYNC_SYNTHETIC_GUEST};
  PageIndex first = 0;
  for (const GuestRegionSpec& spec : specs) {
    // Not close-on-exec: the guest maps the same file.
    UniqueFd file(::memfd_create("guest-ram", 0));
    Require(file.valid() && ::ftruncate(file.get(), PagesToBytes(spec.pages)) == 0, "memfd");
    void* const memory = ::mmap(nullptr, PagesToBytes(spec.pages), PROT_READ | PROT_WRITE,
                                MAP_SHARED, file.get(), 0);
    Require(memory != MAP_FAILED, "mmap");
    memory_.push_back(static_cast<std::byte*>(memory));
    regions_.push_back(
        *DescribeRegion("ram" + std::to_string(regions_.size()), file.get(), {first, spec.pages}));
    arguments.push_back(std::to_string(file.get()) + ":" + std::to_string(spec.pages) +
                        (spec.split ? ":split" : ""));
    files_.push_back(std::move(file));
    first += spec.pages;
  }
  int in[2];
  int out[2];
  Require(::pipe2(in, O_CLOEXEC) == 0 && ::pipe2(out, O_CLOEXEC) == 0, "pipe");
  std::vector<char*> argv;
  for (std::string& argument : arguments) argv.push_back(argument.data());
  argv.push_back(nullptr);
  std::string preload = "LD_PRELOAD=" PRESYNC_GLUE_LIBRARY;
  std::string socket = "PRESYNC_GLUE_SOCKET=" + socket_;
  char* environment[] = {preload.data(), socket.data(), nullptr};
  pid_ = ::fork();
  Require(pid_ >= 0, "fork");
  if (pid_ == 0) {
    ::prctl(PR_SET_PDEATHSIG, SIGKILL);
    ::dup2(in[0], STDIN_FILENO);
    ::dup2(out[1], STDOUT_FILENO);
    ::execve(argv[0], argv.data(), environment);
    ::_exit(127);
  }
  ::close(in[0]);
  ::close(out[1]);
  to_guest_.reset(in[1]);
  from_guest_.reset(out[0]);
  Require(Answer() == 0, "starting the synthetic guest");
}

SyntheticGuest::~SyntheticGuest() {
  Kill();
  for (size_t i = 0; i < memory_.size(); ++i) {
    ::munmap(memory_[i], PagesToBytes(regions_[i].run.count));
  }
}

int SyntheticGuest::Do(guest_op op, uint32_t region, uint32_t page, uint32_t count, uint64_t seed) {
  const guest_command command = {static_cast<uint32_t>(op), region, page, count, seed};
  Require(::write(to_guest_.get(), &command, sizeof(command)) == sizeof(command), "guest command");
  return Answer();
}

void SyntheticGuest::Send(guest_op op, uint32_t region, uint32_t page, uint32_t count) {
  const guest_command command = {static_cast<uint32_t>(op), region, page, count, 0};
  Require(::write(to_guest_.get(), &command, sizeof(command)) == sizeof(command), "guest command");
}

int SyntheticGuest::Answer() {
  int32_t answer = EPIPE;
  const ssize_t bytes = ::read(from_guest_.get(), &answer, sizeof(answer));
  return bytes == sizeof(answer) ? answer : EPIPE;
}

void SyntheticGuest::Kill() {
  if (pid_ <= 0) return;
  ::kill(pid_, SIGKILL);
  ::waitpid(pid_, nullptr, 0);
  pid_ = -1;
}

std::byte* SyntheticGuest::Page(PageIndex page) const {
  for (size_t i = 0; i < regions_.size(); ++i) {
    if (page < regions_[i].run.end())
      return memory_[i] + PagesToBytes(page - regions_[i].run.first);
  }
  std::abort();
}

}  // namespace presync::testing
