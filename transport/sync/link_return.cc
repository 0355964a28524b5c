#include "transport/sync/link_return.h"

#include <utility>

#include "absl/strings/str_cat.h"
#include "transport/clock.h"
#include "transport/sync/conversation.h"
#include "transport/sync/link_messages.h"

namespace presync {

using Body = wire::ControlMessage;

LinkReturn::LinkReturn(const GuestMemory* memory, RdmaSourceOptions options, uint32_t number,
                       ControlChannel* channel)
    : memory_(memory),
      options_(std::move(options)),
      number_(number),
      peer_(channel->peer()),
      deadline_(MonotonicNow() + RdmaTimeout(*memory)) {
  options_.progress = [this](uint64_t, uint64_t) { return !abandoned_; };
  Body message;
  message.mutable_open_link()->set_link(number);
  message.mutable_open_link()->set_kind(wire::OpenLink::RDMA);
  message.mutable_open_link()->set_queue_pairs(options_.queue_pairs);
  absl::Status sent = channel->Send(message, MonotonicNow() + absl::Seconds(1));
  if (!sent.ok()) Fail(sent);
}

LinkReturn::~LinkReturn() {
  Abandon();
  if (thread_.joinable()) thread_.join();
}

void LinkReturn::OnMessage(const Body& message) {
  switch (message.body_case()) {
    case Body::kLinkOffer: {
      absl::StatusOr<RdmaOffer> offer = OfferFromWire(message.link_offer());
      if (!offer.ok() || thread_.joinable()) {
        return Fail(offer.ok() ? absl::InvalidArgumentError("the target offered a link twice")
                               : offer.status());
      }
      thread_ = std::thread([this, taken = *std::move(offer)] { Connect(taken); });
      return;
    }
    case Body::kLinkReady: {
      MutexLock lock(&mutex_);
      target_ready_ = true;
      return;
    }
    case Body::kLinkRefused: {
      wire::Refused refused;
      refused.set_code(message.link_refused().code());
      refused.set_text(message.link_refused().text());
      return Fail(RefusedStatus(refused, peer_));
    }
    default:
      return;
  }
}

void LinkReturn::Connect(const RdmaOffer& offer) {
  absl::StatusOr<RdmaSource> link = ConnectRdma(memory_, offer, options_, deadline_);
  if (!link.ok()) return Fail(link.status());
  MutexLock lock(&mutex_);
  link_ = *std::move(link);
}

void LinkReturn::Fail(const absl::Status& why) {
  MutexLock lock(&mutex_);
  status_.Update(why);
}

absl::Status LinkReturn::status() const {
  MutexLock lock(&mutex_);
  if (status_.ok() && (link_.link == nullptr || !target_ready_) && MonotonicNow() > deadline_) {
    return absl::DeadlineExceededError("the RDMA link did not come up in time");
  }
  return status_;
}

bool LinkReturn::ready() const {
  MutexLock lock(&mutex_);
  return status_.ok() && link_.link != nullptr && target_ready_;
}

RdmaSource LinkReturn::Take() {
  MutexLock lock(&mutex_);
  return std::move(link_);
}

}  // namespace presync
