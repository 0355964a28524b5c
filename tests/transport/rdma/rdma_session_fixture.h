// Sessions over RDMA, one device at a time. The control connection is on loopback, so that it
// outlives the RDMA path.
#pragma once

#include <cstdio>
#include <string>
#include <utility>
#include <vector>

#include "tests/transport/rdma/rdma_fixture.h"
#include "tests/transport/sync/session_fixture.h"

namespace presync {

class RdmaSessionTest : public SessionTest, public ::testing::WithParamInterface<TestDevice> {
 protected:
  RdmaSessionTest() {
    patience_ = 24000;  // 2 minutes: the devices, and the machine, may be emulated
    source_options_.rdma.queue_pairs = 2;
    source_options_.rdma_retry = absl::Milliseconds(300);
    source_options_.rdma_retry_longest = absl::Seconds(2);
    source_options_.log = [this](bool, const std::string& line) {
      MutexLock lock(&running_mutex_);
      lines_.push_back(line);
    };
    RestartTarget({GetParam().address});
  }
  ~RdmaSessionTest() override {
    StopWriting();
    session_.reset();  // it logs to lines_
    for (const std::string& line : lines_) std::printf("  log: %s\n", line.c_str());
  }

  void RestartTarget(std::vector<std::string> addresses) {
    service_.reset();
    target_options_.rdma.addresses = std::move(addresses);
    StartTarget();
  }

  bool AwaitLink(const std::string& link) {
    return Await([&] { return session_->status().link == link; });
  }
  bool AwaitSynced() {
    return Await([&] { return session_->status().progress.residual == 0; });
  }

  std::vector<std::string> lines_;
};

}  // namespace presync
