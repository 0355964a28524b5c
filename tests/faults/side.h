// One host's presyncd as the fault campaign sees it: a process that can crash or be stopped at any
// moment, with everything it does to the outside passing a gate.
#pragma once

#include <atomic>
#include <filesystem>
#include <functional>
#include <mutex>
#include <shared_mutex>
#include <string>
#include <thread>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "transport/clock.h"

namespace presync {

// One life of a presyncd. A crash keeps what is durable, the record folder as it is at that moment,
// and lets nothing of this life reach the outside any more; its threads run on without effect until
// they end. Thread-safe.
class Life {
 public:
  explicit Life(std::string record_folder) : record_folder_(std::move(record_folder)) {}

  // Runs `effect`, which reaches the outside, unless this life is over; waits while it is stopped.
  absl::Status Act(const std::function<void()>& effect) {
    AwaitRunning();
    std::shared_lock lock(gate_);
    if (crashed_) return absl::UnavailableError("this presyncd has crashed");
    effect();
    return absl::OkStatus();
  }

  bool crashed() const { return crashed_; }

  // The process ends without a word; `durable` becomes what its record folder holds.
  void Crash(const std::filesystem::path& durable) {
    std::unique_lock lock(gate_);
    if (crashed_) return;
    std::filesystem::create_directory(durable);
    std::error_code gone;  // a record that is removed at this very moment is removed
    for (const auto& record : std::filesystem::directory_iterator(record_folder_, gone)) {
      std::filesystem::copy_file(record.path(), durable / record.path().filename(), gone);
    }
    crashed_ = true;
  }

  // As SIGSTOP, with SIGCONT after `how_long`.
  void Stop(absl::Duration how_long) {
    stopped_until_us_ = absl::ToUnixMicros(MonotonicNow() + how_long);
  }
  void AwaitRunning() const {
    while (!crashed_ && absl::ToUnixMicros(MonotonicNow()) < stopped_until_us_) {
      absl::SleepFor(absl::Milliseconds(1));
    }
  }
  void Continue() { stopped_until_us_ = 0; }

  const std::string& record_folder() const { return record_folder_; }

 private:
  const std::string record_folder_;
  std::shared_mutex gate_;  // shared by effects
  std::atomic<bool> crashed_ = false;
  std::atomic<int64_t> stopped_until_us_ = 0;
};

}  // namespace presync
