// The state of one conversation at the target. For target_session.cc and target_session_handover.cc
// only: everybody else has RunTargetConversation.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <thread>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "transport/clock.h"
#include "transport/guest.h"
#include "transport/sync/conversation.h"
#include "transport/sync/handover_record.h"
#include "transport/sync/target_links.h"
#include "transport/sync/target_service.h"
#include "transport/unique_fd.h"
#include "transport/wire/control_channel.h"

namespace presync {

// docs/protocol.md, "The target's conversation". One thread uses it, but for the hasher and what
// brings links up, which touch the guest's memory and the channel only.
class TargetConversation {
 public:
  TargetConversation(TargetService* service, ControlChannel* channel)
      : service_(service),
        channel_(channel),
        staged_share_(service->state_budget(), channel->peer_name()) {}

  void Run();

 private:
  absl::Status Open(const wire::OpenSession& open);
  void CompareShape(const wire::OpenSession& open, wire::SessionOpened* opened);
  absl::Status CloseOlderHandovers();
  absl::Status OpenTcpLink(uint32_t streams, wire::ControlMessage opened);
  absl::StatusOr<wire::SessionOpened::Content> PreparePlace(const wire::OpenSession& open);
  absl::Status LookAtCopy();
  absl::Status CheckRecords(const SessionId& session);
  absl::Status ReserveRecord();
  void OnLinkUp();
  absl::Status Serve();
  absl::Status CheckMemory();
  absl::Status Handle(const wire::ControlMessage& message);
  absl::Status BeginHandover();
  absl::Status TakeState(const wire::StateChunk& chunk);
  absl::Status WithLastWords(absl::Status status);
  absl::Status AnswerHashes(const wire::HashRequest& request);
  void FinishHashing();
  absl::Status Load(const wire::Load& load);
  absl::Status RunGuest();
  void AbortHandover(bool source_has_it);
  void End(const absl::Status& why);

  absl::Status Send(const wire::ControlMessage& message) {
    return channel_->Send(message, MonotonicNow() + kSendTimeout);
  }

  static constexpr absl::Duration kSendTimeout = absl::Seconds(5);
  static constexpr absl::Duration kGuestTimeout = kWaitingGuestTimeout;

  TargetService* const service_;
  ControlChannel* const channel_;
  TargetSlot* slot_ = nullptr;
  uint32_t version_ = 0;
  std::unique_ptr<TargetLinks> links_;  // from the opened session on

  // The handover, from BeginHandover on.
  TargetGuest* guest_ = nullptr;
  std::optional<HandoverRecord> record_;
  UniqueFd state_stream_;
  std::string staged_;
  StateBudget::Share staged_share_;
  uint64_t state_bytes_ = 0;
  std::thread hasher_;
  bool loading_ =
      false;  // bytes saved after the stop were given to the guest: it may have written its RAM
  bool loaded_ = false;
  bool forget_ = false;
  bool over_ = false;
};

}  // namespace presync
