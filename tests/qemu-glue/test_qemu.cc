#include "tests/qemu-glue/test_qemu.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "transport/clock.h"

namespace presync {
namespace {

constexpr size_t kBiosBytes = 256 << 10;

// Runs from the reset vector on, in place of SeaBIOS.
std::string CounterBios() {
  constexpr std::array<uint8_t, 22> kProgram = {
      0xfa,                          //       cli
      0x31, 0xc0,                    //       xor  %ax, %ax
      0x8e, 0xd8,                    //       mov  %ax, %ds
      0x66, 0x31, 0xc0,              //       xor  %eax, %eax
      0x66, 0x40,                    // loop: inc  %eax
      0x66, 0xa3, 0x00, 0x10,        //       mov  %eax, 0x1000
      0x66, 0xff, 0x06, 0x00, 0x20,  //       incl 0x2000
      0xeb, 0xf3,                    //       jmp  loop
      0xf4,                          //       hlt (never reached)
  };
  constexpr std::array<uint8_t, 3> kReset = {0xe9, 0x0d, 0xf0};  // jmp 0xf000, from 0xfff0
  std::string bios(kBiosBytes, '\x90');
  const size_t segment = kBiosBytes - 0x10000;
  std::copy(kProgram.begin(), kProgram.end(), bios.begin() + segment + 0xf000);
  std::copy(kReset.begin(), kReset.end(), bios.begin() + segment + 0xfff0);
  return bios;
}

// A test that can't even set its stage has nothing to report but that.
[[noreturn]] void GiveUp(const std::string& why) {
  std::fprintf(stderr, "test set-up: %s\n", why.c_str());
  std::abort();
}

std::string Environment(const char* name) {
  const char* value = std::getenv(name);  // NOLINT(concurrency-mt-unsafe)
  return value == nullptr ? "" : value;
}

}  // namespace

std::vector<QemuVersionUnderTest> QemuVersionsUnderTest() {
  QemuVersionUnderTest system{"System", "/usr/bin/qemu-system-x86_64", "", ""};
  if (::access(system.binary.c_str(), X_OK) != 0) {
    system.skip_reason = system.binary + " is not installed (package qemu-system-x86)";
    system.binary.clear();
  }
  QemuVersionUnderTest ten{"Qemu10", Environment("PRESYNC_QEMU10"),
                           Environment("PRESYNC_QEMU10_DATA"),
                           "PRESYNC_QEMU10 names no QEMU 10 binary"};
  return {system, ten};
}

TestFolder::TestFolder() {
  char folder[] = "/tmp/presync-qemu-XXXXXX";
  char ram_folder[] = "/dev/shm/presync-qemu-XXXXXX";
  if (::mkdtemp(folder) == nullptr || ::mkdtemp(ram_folder) == nullptr) GiveUp("mkdtemp failed");
  folder_ = folder;
  ram_folder_ = ram_folder;
  std::ofstream(Path(kTestBios), std::ios::binary) << CounterBios();
}

TestFolder::~TestFolder() {
  std::error_code ignored;
  std::filesystem::remove_all(folder_, ignored);
  std::filesystem::remove_all(ram_folder_, ignored);
}

TestQemu::TestQemu(const TestFolder& folder, const QemuVersionUnderTest& version,
                   const std::string& name, const TestQemuOptions& options)
    : qmp_path_(folder.Path(name + ".qmp")), ram_path_(folder.RamPath(name)) {
  QemuProcess::Options start;
  start.qmp_path = qmp_path_;
  start.log_path = folder.Path(name + ".log");
  start.argv = {version.binary,
                "-accel",
                "tcg",
                "-nodefaults",
                "-no-user-config",
                "-display",
                "none",
                "-bios",
                folder.Path(kTestBios),
                "-qmp",
                absl::StrCat("unix:", qmp_path_, ",server=on,wait=off")};
  auto add = [&start](std::initializer_list<std::string> arguments) {
    start.argv.insert(start.argv.end(), arguments);
  };
  if (!version.data.empty()) add({"-L", version.data});
  if (options.default_ram) {
    add({"-m", "64M", "-machine", "q35,memory-backend=ram0", "-object",
         absl::StrCat("memory-backend-file,id=ram0,size=64M,share=on,mem-path=", ram_path_)});
  }
  if (options.target) add({"-incoming", "defer"});
  if (options.stopped) add({"-S"});
  start.argv.insert(start.argv.end(), options.more.begin(), options.more.end());
  absl::StatusOr<QemuProcess> process =
      QemuProcess::Start(start, MonotonicNow() + absl::Seconds(60));
  if (!process.ok()) GiveUp(std::string(process.status().message()));
  process_ = std::make_unique<QemuProcess>(*std::move(process));
  ram_ = UniqueFd(::open(ram_path_.c_str(), O_RDWR | O_CLOEXEC));
}

TestQemu::~TestQemu() {
  absl::Status killed = process_->Kill(MonotonicNow() + absl::Seconds(30));
  EXPECT_TRUE(killed.ok()) << killed;
}

uint32_t TestQemu::ReadRam(size_t offset) const {
  uint32_t value = 0;
  EXPECT_EQ(::pread(ram_.get(), &value, sizeof(value), static_cast<off_t>(offset)),
            static_cast<ssize_t>(sizeof(value)));
  return value;
}

bool TestQemu::CounterMoves(absl::Duration patience) const {
  const uint32_t before = RegisterCounter();
  for (const absl::Time end = MonotonicNow() + patience; MonotonicNow() < end;) {
    if (RegisterCounter() != before) return true;
    absl::SleepFor(absl::Milliseconds(1));
  }
  return false;
}

}  // namespace presync
