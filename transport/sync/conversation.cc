#include "transport/sync/conversation.h"

#include <unistd.h>

#include <algorithm>
#include <string>

#include "absl/strings/str_cat.h"
#include "transport/clock.h"
#include "transport/printable.h"
#include "transport/wire/version.h"

namespace presync {
namespace {

using Body = wire::ControlMessage;

// How soon a wait is given up that nobody wants any more.
constexpr absl::Duration kLookForEnd = absl::Milliseconds(250);

std::string HostName() {
  char name[256] = {};
  return ::gethostname(name, sizeof(name) - 1) == 0 ? name : "unknown";
}

}  // namespace

std::string AddressOf(const std::string& peer) {
  const std::string endpoint = peer.substr(0, peer.find(' '));
  return endpoint.substr(0, endpoint.rfind(':'));
}

uint32_t CommonVersion(uint32_t newest_a, uint32_t oldest_a, uint32_t newest_b, uint32_t oldest_b) {
  const uint32_t common = std::min(newest_a, newest_b);
  return common >= oldest_a && common >= oldest_b ? common : 0;
}

absl::StatusOr<uint32_t> ExchangeHello(ControlChannel* channel, absl::Time deadline) {
  Body message;
  wire::Hello* mine = message.mutable_hello();
  mine->set_newest_version(kNewestProtocolVersion);
  mine->set_oldest_version(kOldestProtocolVersion);
  mine->set_software(kSoftware);
  mine->set_host(HostName());
  if (absl::Status s = channel->Send(message, deadline); !s.ok()) return s;
  absl::StatusOr<Body> reply = Expect(channel, Body::kHello, deadline);
  if (!reply.ok()) return reply.status();
  const wire::Hello& theirs = reply->hello();
  const uint32_t version = CommonVersion(kNewestProtocolVersion, kOldestProtocolVersion,
                                         theirs.newest_version(), theirs.oldest_version());
  if (version == 0) {
    return absl::FailedPreconditionError(
        absl::StrCat(channel->peer(), " runs ", PrintableText(theirs.software()), " (protocol ",
                     theirs.oldest_version(), " to ", theirs.newest_version(), "), this host ",
                     kSoftware, " (protocol ", kOldestProtocolVersion, " to ",
                     kNewestProtocolVersion, "): upgrade the older one"));
  }
  return version;
}

bool IsAside(const Body& message) {
  switch (message.body_case()) {
    case Body::kPing:
    case Body::kPong:
    case Body::kLinkOffer:
    case Body::kLinkReady:
    case Body::kLinkRefused:
    case Body::kLinkClosed:
    case Body::kLaunchComing:
    case Body::kLaunchExpected:
    case Body::kLaunchOff:
      return true;
    case Body::kHashReply:  // of a comparison beside everything else, which may be over by now
      return message.hash_reply().id() != 0;
    default:
      return false;
  }
}

absl::StatusOr<Body> Expect(ControlChannel* channel, Body::BodyCase wanted, absl::Time deadline,
                            absl::FunctionRef<bool()> give_up) {
  while (true) {
    const absl::Time look = std::min(deadline, MonotonicNow() + kLookForEnd);
    absl::StatusOr<Body> message = channel->Receive(look);
    if (!message.ok()) {
      if (!absl::IsDeadlineExceeded(message.status())) return message.status();
      if (give_up()) return absl::CancelledError("no longer waited for");
      if (look < deadline) continue;
      return absl::DeadlineExceededError(absl::StrCat(channel->peer(), " did not answer in time"));
    }
    if (message->body_case() == wanted) return message;
    if (message->body_case() == Body::kRefused) {
      return RefusedStatus(message->refused(), channel->peer());
    }
    if (!IsAside(*message)) {
      return absl::InvalidArgumentError(absl::StrCat(
          channel->peer(), " sent message ", message->body_case(), " where ", wanted, " was due"));
    }
  }
}

Body MakeRefused(const absl::Status& status) {
  Body message;
  message.mutable_refused()->set_code(static_cast<uint32_t>(status.code()));
  message.mutable_refused()->set_text(std::string(status.message()));
  return message;
}

absl::Status RefusedStatus(const wire::Refused& refused, absl::string_view peer) {
  auto code = static_cast<absl::StatusCode>(refused.code());
  const bool known = refused.code() >= 1 && refused.code() <= 16;
  if (!known) code = absl::StatusCode::kUnknown;
  return absl::Status(code, absl::StrCat(peer, ": ", PrintableText(refused.text())));
}

}  // namespace presync
