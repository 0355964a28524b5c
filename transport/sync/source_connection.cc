#include "transport/sync/source_connection.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "transport/sync/conversation.h"
#include "transport/tcp/tcp_source_link.h"

namespace presync {
namespace {

using Body = wire::ControlMessage;

absl::StatusOr<std::unique_ptr<ControlChannel>> DialControl(Dialer* dialer, absl::Time deadline) {
  absl::StatusOr<UniqueFd> socket = dialer->Dial({.kind = Preamble::Kind::kControl}, deadline);
  if (!socket.ok()) return socket.status();
  auto channel = std::make_unique<ControlChannel>(*std::move(socket), dialer->peer());
  if (absl::StatusOr<uint32_t> v = ExchangeHello(channel.get(), deadline); !v.ok()) {
    return v.status();
  }
  return channel;
}

SourceSync::TargetContent ToContent(wire::SessionOpened::Content content) {
  switch (content) {
    case wire::SessionOpened::ZERO:
      return SourceSync::TargetContent::kZero;
    case wire::SessionOpened::KEPT:
      return SourceSync::TargetContent::kKept;
    default:
      return SourceSync::TargetContent::kUnknown;
  }
}

absl::StatusOr<std::unique_ptr<SourceLink>> DialTcpLink(Dialer* dialer, const GuestMemory* memory,
                                                        const SessionRequest& request,
                                                        const wire::SessionOpened& opened,
                                                        absl::Time deadline) {
  const absl::StatusOr<SessionId> token = IdFromBytes(opened.token());
  if (!token.ok() || opened.tcp_streams() == 0 || opened.tcp_streams() > request.tcp_streams) {
    return absl::InvalidArgumentError(
        absl::StrCat(dialer->peer(), " opened the session with a bad token or stream count"));
  }
  std::vector<UniqueFd> sockets;
  for (uint32_t i = 0; i < opened.tcp_streams(); ++i) {
    absl::StatusOr<UniqueFd> socket =
        dialer->Dial({.kind = Preamble::Kind::kData, .stream = i, .token = *token}, deadline);
    if (!socket.ok()) return socket.status();
    sockets.push_back(*std::move(socket));
  }
  absl::StatusOr<std::unique_ptr<TcpSourceLink>> link =
      TcpSourceLink::Create(memory, std::move(sockets), request.tcp, request.socket);
  if (!link.ok()) return link.status();
  return *std::move(link);
}

}  // namespace

absl::StatusOr<SourceConnection> ConnectSource(Dialer* dialer, const GuestMemory* memory,
                                               const SessionRequest& request, absl::Time deadline) {
  absl::StatusOr<std::unique_ptr<ControlChannel>> channel = DialControl(dialer, deadline);
  if (!channel.ok()) return channel.status();

  Body message;
  wire::OpenSession* open = message.mutable_open_session();
  open->set_session_id(IdToBytes(request.session));
  open->set_guest(request.guest);
  open->set_page_bytes(kPageBytes);
  open->set_tcp_streams(request.tcp_streams);
  for (const Region& region : memory->regions()) {
    wire::RegionSpec* spec = open->add_regions();
    spec->set_name(region.name());
    spec->set_size_bytes(region.size_bytes());
  }
  if (absl::Status s = (*channel)->Send(message, deadline); !s.ok()) return s;
  absl::StatusOr<Body> opened = Expect(channel->get(), Body::kSessionOpened, deadline);
  if (!opened.ok()) return opened.status();

  absl::StatusOr<std::unique_ptr<SourceLink>> link =
      DialTcpLink(dialer, memory, request, opened->session_opened(), deadline);
  if (!link.ok()) return link.status();
  absl::StatusOr<Body> ready = Expect(channel->get(), Body::kLinkReady, deadline);
  if (!ready.ok()) return ready.status();
  return SourceConnection{.channel = *std::move(channel),
                          .link = *std::move(link),
                          .content = ToContent(opened->session_opened().content())};
}

absl::StatusOr<wire::Outcome> AskOutcome(Dialer* dialer, const SessionId& session,
                                         const std::string& guest, absl::Time deadline) {
  absl::StatusOr<std::unique_ptr<ControlChannel>> channel = DialControl(dialer, deadline);
  if (!channel.ok()) return channel.status();
  Body message;
  message.mutable_query_outcome()->set_session_id(IdToBytes(session));
  message.mutable_query_outcome()->set_guest(guest);
  if (absl::Status s = (*channel)->Send(message, deadline); !s.ok()) return s;
  absl::StatusOr<Body> outcome = Expect(channel->get(), Body::kOutcome, deadline);
  if (!outcome.ok()) return outcome.status();
  return outcome->outcome();
}

}  // namespace presync
