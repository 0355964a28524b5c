#include "transport/sync/link_messages.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "transport/printable.h"
#include "transport/sync/conversation.h"
#include "transport/sync/session_id.h"

namespace presync {
namespace {

using Body = wire::ControlMessage;

constexpr int kMaxWindows = 1 << 16;

absl::Status OfferError(const char* what) {
  return absl::InvalidArgumentError(absl::StrCat("the target offers an RDMA link with ", what));
}

}  // namespace

Body MakeOffer(uint32_t link, const RdmaOffer& offer) {
  Body message;
  wire::LinkOffer* out = message.mutable_link_offer();
  out->set_link(link);
  out->set_token(IdToBytes(offer.token));
  out->set_queue_pairs(offer.queue_pairs);
  for (const RdmaEndpoint& endpoint : offer.endpoints) {
    wire::RdmaEndpoint* to = out->add_endpoints();
    to->set_address(endpoint.address);
    to->set_port(endpoint.port);
    to->set_device(endpoint.device);
    for (const RdmaWindow& window : endpoint.windows) {
      wire::RdmaWindow* w = to->add_windows();
      w->set_region(window.region);
      w->set_offset_bytes(window.offset_bytes);
      w->set_size_bytes(window.size_bytes);
      w->set_address(window.address);
      w->set_key(window.key);
    }
  }
  return message;
}

absl::StatusOr<RdmaOffer> OfferFromWire(const wire::LinkOffer& offer) {
  RdmaOffer out;
  const absl::StatusOr<SessionId> token = IdFromBytes(offer.token());
  if (!token.ok()) return OfferError("a bad token");
  out.token = *token;
  out.queue_pairs = offer.queue_pairs();
  if (offer.endpoints_size() < 1 || offer.endpoints_size() > static_cast<int>(kMaxRdmaDevices)) {
    return OfferError("a bad number of endpoints");
  }
  for (const wire::RdmaEndpoint& from : offer.endpoints()) {
    if (from.port() == 0 || from.port() > UINT16_MAX || from.windows_size() > kMaxWindows) {
      return OfferError("a bad port or number of windows");
    }
    RdmaEndpoint endpoint = {.address = from.address(),
                             .port = static_cast<uint16_t>(from.port()),
                             .device = PrintableText(from.device())};
    for (const wire::RdmaWindow& window : from.windows()) {
      endpoint.windows.push_back({.region = window.region(),
                                  .offset_bytes = window.offset_bytes(),
                                  .size_bytes = window.size_bytes(),
                                  .address = window.address(),
                                  .key = window.key()});
    }
    out.endpoints.push_back(std::move(endpoint));
  }
  return out;
}

Body MakeLinkRefused(uint32_t link, const absl::Status& status) {
  Body message;
  message.mutable_link_refused()->set_link(link);
  message.mutable_link_refused()->set_code(static_cast<uint32_t>(status.code()));
  message.mutable_link_refused()->set_text(std::string(status.message()));
  return message;
}

Body MakeLinkReady(uint32_t link) {
  Body message;
  message.mutable_link_ready()->set_link(link);
  return message;
}

Body MakeCloseLink(uint32_t link) {
  Body message;
  message.mutable_close_link()->set_link(link);
  return message;
}

Body MakeLinkClosed(uint32_t link) {
  Body message;
  message.mutable_link_closed()->set_link(link);
  return message;
}

uint32_t LinkOf(const Body& message) {
  switch (message.body_case()) {
    case Body::kLinkOffer:
      return message.link_offer().link();
    case Body::kLinkRefused:
      return message.link_refused().link();
    case Body::kLinkReady:
      return message.link_ready().link();
    case Body::kLinkClosed:
      return message.link_closed().link();
    default:
      return 0;
  }
}

absl::StatusOr<Body> ExpectAbout(ControlChannel* channel, Body::BodyCase wanted, uint32_t link,
                                 absl::Time deadline) {
  while (true) {
    absl::StatusOr<Body> message = channel->Receive(deadline);
    if (absl::IsDeadlineExceeded(message.status())) {
      return absl::DeadlineExceededError(absl::StrCat(channel->peer(), " did not answer in time"));
    }
    if (!message.ok()) return message.status();
    if (message->body_case() == Body::kRefused) {
      return RefusedStatus(message->refused(), channel->peer());
    }
    const bool about = LinkOf(*message) == link;
    if (about && message->body_case() == wanted) return message;
    if (about && message->body_case() == Body::kLinkRefused) {
      wire::Refused refused;
      refused.set_code(message->link_refused().code());
      refused.set_text(message->link_refused().text());
      return RefusedStatus(refused, channel->peer());
    }
    if (!IsAside(*message)) {
      return absl::InvalidArgumentError(absl::StrCat(
          channel->peer(), " sent message ", message->body_case(), " where ", wanted, " was due"));
    }
  }
}

}  // namespace presync
