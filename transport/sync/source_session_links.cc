// How a source's session moves from RDMA to TCP when RDMA fails, and back when it works again.
#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "transport/clock.h"
#include "transport/sync/link_messages.h"
#include "transport/sync/source_session.h"
#include "transport/wire/version.h"

namespace presync {
namespace {

// The control connection works, so this takes some round trips; if it does not, everything is
// connected anew.
constexpr absl::Duration kFallTimeout = absl::Seconds(5);
// An RDMA link that held for so long was sound: what breaks it is a new matter.
constexpr absl::Duration kSoundAfter = absl::Minutes(5);

}  // namespace

bool SourceSession::RdmaFailed() const {
  return connection_.link != nullptr && connection_.link->name() == "rdma" &&
         !connection_.link->Post({}).ok();
}

void SourceSession::NoteRdmaFailure(const absl::Status& why) {
  if (MonotonicNow() - rdma_since_ > kSoundAfter) rdma_wait_ = absl::ZeroDuration();
  rdma_problem_ = std::string(why.message());
  lost_devices_ = connection_.devices;
  PostponeRdma();
}

// RDMA failed; if the control connection did not, TCP goes on with everything that was confirmed.
bool SourceSession::FallBack(const absl::Status& why) {
  if (options_.transport != Transport::kAuto || state_ == SessionState::kLaunching) return false;
  const absl::Time began = MonotonicNow();
  sync_->DetachLink();
  std::unique_ptr<SourceLink> failed;
  const absl::Status fell = FallToTcp(dialer_.get(), memory_.get(), Request(), &connection_,
                                      &failed, began + kFallTimeout);
  Retire(std::move(failed));
  if (!fell.ok()) {
    problem_ = absl::StrCat(why.message(), "; and TCP in its place: ", fell.message());
    return false;
  }
  sync_->AttachLink(connection_.link.get(), SourceSync::TargetContent::kKept);
  connection_.why = absl::StrCat("TCP, for RDMA failed: ", rdma_problem_);
  problem_.clear();
  options_.log(
      true,
      absl::StrCat(options_.guest, ": moved from RDMA to TCP within ",
                   absl::FormatDuration(absl::Trunc(MonotonicNow() - began, absl::Milliseconds(1))),
                   ": ", why.message(), ". RDMA is tried again in ",
                   absl::FormatDuration(rdma_wait_)));
  Publish();
  return true;
}

void SourceSession::PostponeRdma() {
  rdma_wait_ = std::clamp(2 * rdma_wait_, options_.rdma_retry, options_.rdma_retry_longest);
  next_rdma_ = MonotonicNow() + rdma_wait_;
}

// Brings an RDMA link up beside TCP from time to time, and moves to it once it is there.
void SourceSession::TryRdmaAgain() {
  if (options_.transport != Transport::kAuto || connection_.version < kLinksVersion ||
      connection_.link->name() == "rdma") {
    return;
  }
  if (return_ == nullptr) {
    if (MonotonicNow() < next_rdma_) return;
    // While a device's port is down trying is of no use, and costs some devices their ability to
    // connect at all (soft-RoCE).
    const absl::Status usable =
        CheckRdma(lost_devices_.empty() ? options_.rdma.devices : lost_devices_);
    if (!usable.ok()) return PostponeRdma();
    return_ = std::make_unique<LinkReturn>(memory_.get(), options_.rdma, ++connection_.links_opened,
                                           connection_.channel.get());
    next_ping_ = absl::InfinitePast();  // with it comes the look for answers
    return;
  }
  if (const absl::Status status = return_->status(); !status.ok()) {
    if (rdma_problem_ != status.message()) {
      rdma_problem_ = std::string(status.message());
      connection_.why = absl::StrCat("TCP, for RDMA can't be used: ", rdma_problem_);
      options_.log(true, absl::StrCat(options_.guest, ": stays on TCP: ", rdma_problem_));
    }
    EndReturn();
    return PostponeRdma();
  }
  if (return_->ready()) SwitchToRdma();
}

// The switch waits until TCP has confirmed all that it was given, so that no page is under way on
// both; the guest runs on meanwhile, and what it writes is only sent a moment later.
void SourceSession::SwitchToRdma() {
  sync_->set_held(true);
  if (!sync_->quiet()) return;
  RdmaSource made = return_->Take();
  const uint32_t number = return_->number();
  return_.reset();
  sync_->SwitchLink(made.link.get());
  std::unique_ptr<SourceLink> old = std::exchange(connection_.link, std::move(made.link));
  connection_.devices = std::move(made.devices);
  const uint32_t old_number = std::exchange(connection_.link_number, number);
  connection_.channel->Send(MakeCloseLink(old_number), MonotonicNow() + absl::Seconds(1))
      .IgnoreError();  // if it is gone the next Ping says so
  Retire(std::move(old));
  connection_.why =
      absl::StrCat("RDMA works again, over ", absl::StrJoin(connection_.devices, ", "));
  rdma_since_ = MonotonicNow();
  options_.log(false, absl::StrCat(options_.guest, ": moved from TCP back to RDMA"));
  Publish();
}

// Gives a try up: the target is told, and what comes of it later is passed over.
void SourceSession::EndReturn() {
  sync_->set_held(false);
  if (return_ == nullptr) return;
  return_->Abandon();
  if (connection_.channel != nullptr) {
    connection_.channel->Send(MakeCloseLink(return_->number()), MonotonicNow() + absl::Seconds(1))
        .IgnoreError();
  }
  // Its thread may be in the middle of a registration: not waited for here.
  if (retiring_.joinable()) retiring_.join();
  retiring_ = std::thread([attempt = std::move(return_)] {});
}

void SourceSession::Retire(std::unique_ptr<SourceLink> link) {
  if (link == nullptr) return;
  if (retiring_.joinable()) retiring_.join();
  retiring_ = std::thread([retired = std::move(link)] {});
}

}  // namespace presync
