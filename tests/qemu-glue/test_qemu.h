// Real QEMUs for tests: a guest without an operating system whose whole program is two counters.
#pragma once

#include <cstdint>
#include <memory>
#include <ostream>
#include <string>
#include <vector>

#include "absl/time/time.h"
#include "qemu-glue/qemu_process.h"
#include "qemu-glue/qmp/qmp_client.h"

namespace presync {

// Which QEMU a test runs on. 7.2 is the system's; PRESYNC_QEMU10 names another binary and
// PRESYNC_QEMU10_DATA its data folder (-L).
struct QemuVersionUnderTest {
  std::string label;
  std::string binary;  // empty: not there, skip
  std::string data;    // empty: QEMU's own default
  std::string skip_reason;
};
std::vector<QemuVersionUnderTest> QemuVersionsUnderTest();
// For GoogleTest, which would print the bytes.
inline void PrintTo(const QemuVersionUnderTest& version, std::ostream* out) {
  *out << version.label;
}

// A folder in /tmp for sockets, logs and the guest's program, and a name in /dev/shm for its RAM.
// Everything is removed at the end.
class TestFolder {
 public:
  TestFolder();
  TestFolder(const TestFolder&) = delete;
  TestFolder& operator=(const TestFolder&) = delete;
  ~TestFolder();

  std::string Path(const std::string& name) const { return folder_ + "/" + name; }
  std::string RamPath(const std::string& name) const { return ram_folder_ + "/" + name; }

 private:
  std::string folder_;
  std::string ram_folder_;
};

inline constexpr uint64_t kTestRamBytes = uint64_t{64} << 20;

// What a QEMU is started with beside what every test QEMU has.
struct TestQemuOptions {
  bool target = false;            // -incoming defer
  bool stopped = false;           // -S
  bool default_ram = true;        // the file backend ram0, 64 MiB, at RamPath(name)
  std::vector<std::string> more;  // further arguments
};

// A running QEMU, killed at the end of its life. Its monitor is free to take once.
class TestQemu {
 public:
  // Fails the test and aborts it where QEMU does not start.
  TestQemu(const TestFolder& folder, const QemuVersionUnderTest& version, const std::string& name,
           const TestQemuOptions& options);
  TestQemu(const TestQemu&) = delete;
  TestQemu& operator=(const TestQemu&) = delete;
  ~TestQemu();

  std::unique_ptr<QmpClient> TakeMonitor() { return process_->TakeMonitor(); }
  const std::string& qmp_path() const { return qmp_path_; }
  const std::string& ram_path() const { return ram_path_; }
  QemuProcess& process() { return *process_; }

  // The guest's counters: one lives in a register and is stored, the other lives in memory.
  uint32_t RegisterCounter() const { return ReadRam(0x1000); }
  uint32_t MemoryCounter() const { return ReadRam(0x2000); }
  // Whether the register's counter moves on within `patience`.
  bool CounterMoves(absl::Duration patience) const;

 private:
  uint32_t ReadRam(size_t offset) const;

  std::string qmp_path_;
  std::string ram_path_;
  std::unique_ptr<QemuProcess> process_;
  UniqueFd ram_;
};

// Where the guest's program is written by TestFolder: a BIOS of 256 KiB without a zero page.
inline constexpr char kTestBios[] = "bios";

}  // namespace presync
