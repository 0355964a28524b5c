// Small helpers that both ends of the control conversation share.
#pragma once

#include <string>

#include "absl/functional/function_ref.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "transport/wire/control_channel.h"

namespace presync {

// How long a target gives the QEMU that waits there for its monitor to answer; a source waits
// longer for the session.
inline constexpr absl::Duration kWaitingGuestTimeout = absl::Seconds(30);

// Both sides say Hello and agree on a version. FAILED_PRECONDITION: no common version, with what
// both sides speak and which one to upgrade; else as ControlChannel.
absl::StatusOr<uint32_t> ExchangeHello(ControlChannel* channel, absl::Time deadline);

// The version that two ranges have in common, 0 if none: the newest.
uint32_t CommonVersion(uint32_t newest_a, uint32_t oldest_a, uint32_t newest_b, uint32_t oldest_b);

// Whether a message may come between any others: Ping, Pong, what is said about data links and
// about what libvirt is going to do, and hashes that were asked for outside a handover.
bool IsAside(const wire::ControlMessage& message);

// Waits for the message `wanted`. Asides are passed over; Refused becomes its status; anything else
// is INVALID_ARGUMENT. CANCELLED: `give_up`, which is asked some times a second, said so.
absl::StatusOr<wire::ControlMessage> Expect(
    ControlChannel* channel, wire::ControlMessage::BodyCase wanted, absl::Time deadline,
    absl::FunctionRef<bool()> give_up = [] { return false; });

// The most that a guest's shape may have on the wire: it is somebody else's text. A guest of 500
// devices has some 1,500 traits of 40 bytes.
inline constexpr int kMaxTraits = 4096;
inline constexpr size_t kMaxTraitBytes = 256;
// Of what differs so many are named.
inline constexpr int kMaxShapeTexts = 32;

// The address in a channel's "10.0.0.1:4711" or "10.0.0.1:4711 (host1)", without the port, which is
// another one each time.
std::string AddressOf(const std::string& peer);

wire::ControlMessage MakeRefused(const absl::Status& status);
// The status that a Refused carries; never ok, whatever the peer wrote.
absl::Status RefusedStatus(const wire::Refused& refused, absl::string_view peer);

}  // namespace presync
