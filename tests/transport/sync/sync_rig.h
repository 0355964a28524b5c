// A source's engine with a model guest, a fake link and a clock of the test's.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "tests/transport/sync/model_guest.h"
#include "transport/fake/fake_link.h"
#include "transport/sync/source_sync.h"

namespace presync {

// A sync over a fake link, in virtual time.
class SyncRig {
 public:
  using Content = SourceSync::TargetContent;

  explicit SyncRig(std::vector<PageCount> regions = {512, 256}, const std::string& policy = "ewma")
      : source_(regions), target_(regions) {
    Restart(policy);
  }

  // As after the source's presyncd was killed: what was known is gone, the guest and the target's
  // copy are as they were.
  void Restart(const std::string& policy = "ewma") {
    if (sync_ != nullptr) Disconnect();
    sync_.reset();
    log_ = source_.MakeLog();
    SourceSyncOptions options;
    options.policy = policy;
    options.fixed_cost = absl::Milliseconds(50);
    options.now = [this] { return now_; };
    auto sync = SourceSync::Create(&source_.memory(), log_.get(), options);
    EXPECT_TRUE(sync.ok());
    sync_ = *std::move(sync);
  }

  void Connect(Content content, FakeLinkOptions options = {}) {
    options.now = [this] { return now_; };
    options.wait_until = [this](absl::Time until) { now_ = std::max(now_, until); };
    auto link = FakeLink::Create(&source_.memory(), &target_.memory(), options);
    ASSERT_TRUE(link.ok());
    link_ = *std::move(link);
    sync_->AttachLink(link_.source.get(), content);
    if (!has_disks_) sync_->OnDrained();
  }

  void Disconnect() {
    sync_->DetachLink();
    link_ = {};
  }

  // Runs the background sync for `duration`, `write` being called once a millisecond.
  template <typename Write>
  absl::Status Run(absl::Duration duration, Write write) {
    const absl::Time end = now_ + duration;
    while (now_ < end) {
      write();
      if (absl::Status s = sync_->Tick(); !s.ok()) return s;
      now_ += absl::Milliseconds(1);
    }
    return absl::OkStatus();
  }

  absl::Status Level() {
    if (absl::Status s = sync_->Scan(); !s.ok()) return s;
    if (absl::Status s = sync_->FindDiscarded(); !s.ok()) return s;
    return sync_->Flush(now_ + absl::Seconds(60));
  }

  std::vector<PageIndex> Differences() { return source_.scratch().Differences(target_.scratch()); }

  bool has_disks_ = false;  // whose reads may be under way
  absl::Time now_ = absl::UnixEpoch() + absl::Hours(1);
  ModelMemory source_;
  ModelMemory target_;
  std::unique_ptr<DirtyLog> log_;
  FakeLink link_;
  std::unique_ptr<SourceSync> sync_;
};

}  // namespace presync
