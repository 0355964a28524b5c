// What the tests of the guests share: QEMUs to start, a save and a load from end to end.
#pragma once

#include <fcntl.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <sys/socket.h>
#include <unistd.h>

#include <array>
#include <cstdio>
#include <future>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "qemu-glue/qemu_guest.h"
#include "tests/qemu-glue/test_qemu.h"
#include "transport/clock.h"

namespace presync {

// Only a hang reaches this.
inline absl::Time Soon() { return MonotonicNow() + absl::Seconds(60); }
// For what must not happen: how long a test waits to see that it doesn't.
inline constexpr absl::Duration kWhile = absl::Milliseconds(100);
inline constexpr absl::Duration kPatience = absl::Seconds(60);

// Reads the stream to its end, in a thread, as the relay of presyncd does.
inline std::future<std::string> ReadAll(UniqueFd stream) {
  return std::async(std::launch::async, [stream = std::move(stream)] {
    std::string bytes;
    std::array<char, 65536> chunk;
    for (ssize_t n = 0; (n = ::read(stream.get(), chunk.data(), chunk.size())) > 0;) {
      bytes.append(chunk.data(), static_cast<size_t>(n));
    }
    return bytes;
  });
}

inline void CopyFile(const std::string& from, const std::string& to) {
  UniqueFd source(::open(from.c_str(), O_RDONLY | O_CLOEXEC));
  UniqueFd target(::open(to.c_str(), O_WRONLY | O_CLOEXEC));
  std::vector<char> chunk(1 << 20);
  for (uint64_t done = 0; done < kTestRamBytes; done += chunk.size()) {
    const auto offset = static_cast<off_t>(done);
    ASSERT_EQ(::pread(source.get(), chunk.data(), chunk.size(), offset), ssize_t(chunk.size()));
    ASSERT_EQ(::pwrite(target.get(), chunk.data(), chunk.size(), offset), ssize_t(chunk.size()));
  }
}

inline bool WriteAll(const UniqueFd& stream, std::string_view bytes) {
  while (!bytes.empty()) {
    const ssize_t n = ::send(stream.get(), bytes.data(), bytes.size(), MSG_NOSIGNAL);
    if (n <= 0) return false;
    bytes.remove_prefix(static_cast<size_t>(n));
  }
  return true;
}

class QemuGuestTest : public ::testing::TestWithParam<QemuVersionUnderTest> {
 protected:
  void SetUp() override {
    if (GetParam().binary.empty()) GTEST_SKIP() << GetParam().skip_reason;
  }

  std::unique_ptr<TestQemu> StartSource(std::vector<std::string> more = {}) {
    TestQemuOptions options;
    options.more = std::move(more);
    auto qemu = std::make_unique<TestQemu>(folder_, GetParam(), absl::StrCat("source", ++started_),
                                           options);
    EXPECT_TRUE(qemu->CounterMoves(kPatience));
    return qemu;
  }

  std::unique_ptr<TestQemu> StartTarget(bool stopped = true, std::vector<std::string> more = {}) {
    TestQemuOptions options;
    options.target = true;
    options.stopped = stopped;
    options.more = std::move(more);
    return std::make_unique<TestQemu>(folder_, GetParam(), absl::StrCat("target", ++started_),
                                      options);
  }

  static std::unique_ptr<QemuSourceGuest> Source(TestQemu& qemu) {
    absl::StatusOr<std::unique_ptr<QemuSourceGuest>> guest =
        QemuSourceGuest::Create(qemu.TakeMonitor(), Soon());
    EXPECT_TRUE(guest.ok()) << guest.status();
    return *std::move(guest);
  }

  static std::unique_ptr<QemuTargetGuest> Target(TestQemu& qemu) {
    absl::StatusOr<std::unique_ptr<QemuTargetGuest>> guest =
        QemuTargetGuest::Create(qemu.TakeMonitor(), Soon());
    EXPECT_TRUE(guest.ok()) << guest.status();
    return *std::move(guest);
  }

  // Saves `source` to the end and returns its device state.
  static std::string Save(QemuSourceGuest& source) {
    absl::StatusOr<UniqueFd> stream = source.BeginSave(Soon());
    EXPECT_TRUE(stream.ok()) << stream.status();
    if (!stream.ok()) return "";
    std::future<std::string> state = ReadAll(*std::move(stream));
    absl::Status stopped = source.Stop(Soon()).status();
    EXPECT_TRUE(stopped.ok()) << stopped;
    absl::Status finished = source.FinishSave(Soon());
    EXPECT_TRUE(finished.ok()) << finished;
    if (!finished.ok()) ::kill(source.pid(), SIGKILL);  // or the stream would never end
    return state.get();
  }

  static absl::Status Load(QemuTargetGuest& target, std::string_view state) {
    absl::StatusOr<UniqueFd> stream = target.BeginLoad(Soon());
    if (!stream.ok()) return stream.status();
    if (!WriteAll(*stream, state)) return absl::UnavailableError("the target took no more");
    stream->reset();
    return target.AwaitLoaded(Soon());
  }

  static void Report(const char* side, const std::vector<GuestStep>& steps) {
    for (const GuestStep& step : steps) {
      std::printf("[ MEASURED ] %s %s %s: %.1f ms\n", GetParam().label.c_str(), side,
                  std::string(step.name).c_str(), absl::ToDoubleMilliseconds(step.took));
    }
  }

  static std::string OnCapabilities(QmpClient& qmp) {
    absl::StatusOr<Json> all = qmp.Execute("query-migrate-capabilities", nullptr, Soon());
    EXPECT_TRUE(all.ok()) << all.status();
    std::string on;
    for (const Json& one : *all) {
      if (BoolAt(one, "state").value_or(true))
        absl::StrAppend(&on, StringAt(one, "capability"), " ");
    }
    return on;
  }

  TestFolder folder_;
  int started_ = 0;
};

}  // namespace presync
