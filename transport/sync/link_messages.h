// The control messages about data links (protocol version 2 on).
#pragma once

#include <cstdint>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "transport/rdma/rdma_link.h"
#include "transport/wire/control_channel.h"

namespace presync {

wire::ControlMessage MakeOffer(uint32_t link, const RdmaOffer& offer);
// INVALID_ARGUMENT: numbers or lengths that make no sense. Windows are checked by the link.
absl::StatusOr<RdmaOffer> OfferFromWire(const wire::LinkOffer& offer);

wire::ControlMessage MakeLinkRefused(uint32_t link, const absl::Status& status);
wire::ControlMessage MakeLinkReady(uint32_t link);
wire::ControlMessage MakeCloseLink(uint32_t link);
wire::ControlMessage MakeLinkClosed(uint32_t link);

// The link that a message is about; 0 if it is about none. Only what a target sends.
uint32_t LinkOf(const wire::ControlMessage& message);

// Waits for `wanted` about `link`, passing over messages about other links. LinkRefused about it
// becomes its status; else as Expect (conversation.h).
absl::StatusOr<wire::ControlMessage> ExpectAbout(ControlChannel* channel,
                                                 wire::ControlMessage::BodyCase wanted,
                                                 uint32_t link, absl::Time deadline);

}  // namespace presync
