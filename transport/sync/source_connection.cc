#include "transport/sync/source_connection.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "transport/clock.h"
#include "transport/printable.h"
#include "transport/rdma/rdma_link.h"
#include "transport/sync/conversation.h"
#include "transport/sync/link_messages.h"
#include "transport/tcp/tcp_source_link.h"
#include "transport/wire/version.h"

namespace presync {
namespace {

using Body = wire::ControlMessage;

// How long a target may take to answer OpenSession: as long as it gives its own QEMU to start, and
// a second for each GiB, for it reserves the guest's memory first (transport/memory.h).
absl::Duration OpenTimeout(const GuestMemory& memory) {
  const double gib = static_cast<double>(PagesToBytes(memory.pages())) / (uint64_t{1} << 30);
  return kWaitingGuestTimeout + absl::Seconds(15 + gib);
}

absl::StatusOr<std::unique_ptr<ControlChannel>> DialControl(Dialer* dialer, absl::Time deadline,
                                                            uint32_t* version) {
  absl::StatusOr<Connection> connection =
      dialer->Dial({.kind = Preamble::Kind::kControl}, deadline);
  if (!connection.ok()) return connection.status();
  auto channel = std::make_unique<ControlChannel>(*std::move(connection), dialer->peer());
  absl::StatusOr<uint32_t> common = ExchangeHello(channel.get(), deadline);
  if (absl::IsUnavailable(common.status())) {
    // Who may not come is told nothing.
    return absl::UnavailableError(absl::StrCat(common.status().message(),
                                               "; the log of its presyncd says why, if it was not "
                                               "stopped: does it want certificates?"));
  }
  if (!common.ok()) return common.status();
  *version = *common;
  return channel;
}

// All of it or nothing: of a part what is left out would seem to be missing.
void AddShape(const GuestShape& shape, wire::OpenSession* open) {
  const bool fits =
      shape.size() <= kMaxTraits &&
      std::all_of(shape.begin(), shape.end(), [](const GuestTrait& trait) {
        return trait.key.size() <= kMaxTraitBytes && trait.value.size() <= kMaxTraitBytes;
      });
  for (size_t i = 0; fits && i < shape.size(); ++i) {
    wire::Trait* trait = open->add_shape();
    trait->set_key(shape[i].key);
    trait->set_value(shape[i].value);
  }
}

std::vector<std::string> TakeTexts(const google::protobuf::RepeatedPtrField<std::string>& texts) {
  std::vector<std::string> taken;
  for (int i = 0; i < std::min(texts.size(), kMaxShapeTexts); ++i) {
    taken.push_back(PrintableText(texts[i]));
  }
  return taken;
}

SourceSync::TargetContent ToContent(wire::SessionOpened::Content content) {
  switch (content) {
    case wire::SessionOpened::ZERO:
      return SourceSync::TargetContent::kZero;
    case wire::SessionOpened::KEPT:
      return SourceSync::TargetContent::kKept;
    case wire::SessionOpened::COPY:
      return SourceSync::TargetContent::kUnproven;
    default:
      return SourceSync::TargetContent::kUnknown;
  }
}

absl::StatusOr<std::unique_ptr<SourceLink>> DialTcpLink(Dialer* dialer, const GuestMemory* memory,
                                                        const SessionRequest& request,
                                                        const std::string& token_bytes,
                                                        uint32_t streams, absl::Time deadline) {
  const absl::StatusOr<SessionId> token = IdFromBytes(token_bytes);
  if (!token.ok() || streams == 0 || streams > request.tcp_streams) {
    return absl::InvalidArgumentError(
        absl::StrCat(dialer->peer(), " opened the session with a bad token or stream count"));
  }
  if (request.make_link != nullptr) return request.make_link(*token, deadline);
  std::vector<Connection> connections;
  for (uint32_t i = 0; i < streams; ++i) {
    absl::StatusOr<Connection> connection =
        dialer->Dial({.kind = Preamble::Kind::kData, .stream = i, .token = *token}, deadline);
    if (!connection.ok()) return connection.status();
    connections.push_back(*std::move(connection));
  }
  auto made = MakeStreams(std::move(connections), request.socket);
  if (!made.ok()) return made.status();
  absl::StatusOr<std::unique_ptr<TcpSourceLink>> link =
      TcpSourceLink::Create(memory, *std::move(made), request.tcp);
  if (!link.ok()) return link.status();
  return *std::move(link);
}

// Asks for a link and takes the target's offer. A link that does not come up is closed there, by
// CloseLink, whatever was the reason; the conversation goes on.
class LinkOpening {
 public:
  LinkOpening(Dialer* dialer, const GuestMemory* memory, const SessionRequest& request,
              SourceConnection* connection)
      : dialer_(dialer), memory_(memory), request_(request), connection_(connection) {}

  absl::Status Open(wire::OpenLink::Kind kind, absl::Time deadline) {
    number_ = ++connection_->links_opened;
    absl::Status status = TryOpen(kind, deadline);
    if (status.ok()) return status;
    connection_->channel->Send(MakeCloseLink(number_), MonotonicNow() + absl::Seconds(1))
        .IgnoreError();
    return status;
  }

 private:
  absl::Status TryOpen(wire::OpenLink::Kind kind, absl::Time deadline) {
    Body message;
    message.mutable_open_link()->set_link(number_);
    message.mutable_open_link()->set_kind(kind);
    message.mutable_open_link()->set_tcp_streams(request_.tcp_streams);
    message.mutable_open_link()->set_queue_pairs(request_.rdma.queue_pairs);
    ControlChannel* const channel = connection_->channel.get();
    if (absl::Status s = channel->Send(message, deadline); !s.ok()) return s;
    absl::StatusOr<Body> offer = ExpectAbout(channel, Body::kLinkOffer, number_, deadline);
    if (!offer.ok()) return offer.status();
    RdmaSource made;
    if (kind == wire::OpenLink::RDMA) {
      absl::StatusOr<RdmaOffer> taken = OfferFromWire(offer->link_offer());
      if (!taken.ok()) return taken.status();
      absl::StatusOr<RdmaSource> link = ConnectRdma(memory_, *taken, request_.rdma, deadline);
      if (!link.ok()) return link.status();
      made = *std::move(link);
    } else {
      absl::StatusOr<std::unique_ptr<SourceLink>> link =
          DialTcpLink(dialer_, memory_, request_, offer->link_offer().token(),
                      offer->link_offer().tcp_streams(), deadline);
      if (!link.ok()) return link.status();
      made.link = *std::move(link);
    }
    if (auto r = ExpectAbout(channel, Body::kLinkReady, number_, deadline); !r.ok()) {
      return r.status();
    }
    connection_->link = std::move(made.link);
    connection_->devices = std::move(made.devices);
    connection_->link_number = number_;
    return absl::OkStatus();
  }

  Dialer* const dialer_;
  const GuestMemory* const memory_;
  const SessionRequest& request_;
  SourceConnection* const connection_;
  uint32_t number_ = 0;
};

// RDMA if it may be and can be, else TCP.
absl::Status OpenFirstLink(Dialer* dialer, const GuestMemory* memory, const SessionRequest& request,
                           SourceConnection* connection, absl::Time deadline) {
  LinkOpening opening(dialer, memory, request, connection);
  if (request.transport == Transport::kTcp) {
    connection->why = request.tcp_reason;
    return opening.Open(wire::OpenLink::TCP, deadline);
  }
  absl::Status rdma = CheckRdma(request.rdma.devices);
  if (rdma.ok()) rdma = opening.Open(wire::OpenLink::RDMA, MonotonicNow() + RdmaTimeout(*memory));
  if (rdma.ok()) {
    connection->why = absl::StrCat("RDMA works, over ", absl::StrJoin(connection->devices, ", "));
    return rdma;
  }
  if (request.transport == Transport::kRdma) return rdma;
  connection->rdma_problem = std::string(rdma.message());
  connection->why = absl::StrCat("TCP, for RDMA can't be used: ", connection->rdma_problem);
  return opening.Open(wire::OpenLink::TCP, std::max(deadline, MonotonicNow() + absl::Seconds(10)));
}

// Version 1: the session comes with one TCP link.
absl::Status OpenOnlyLink(Dialer* dialer, const GuestMemory* memory, const SessionRequest& request,
                          const wire::SessionOpened& opened, SourceConnection* connection,
                          absl::Time deadline) {
  connection->why = "TCP, for the presync of the target knows no other link: upgrade it";
  if (request.transport == Transport::kRdma) {
    return absl::UnimplementedError(absl::StrCat("the presync of ", dialer->peer(),
                                                 " is too old for RDMA: upgrade it, or use TCP"));
  }
  absl::StatusOr<std::unique_ptr<SourceLink>> link =
      DialTcpLink(dialer, memory, request, opened.token(), opened.tcp_streams(), deadline);
  if (!link.ok()) return link.status();
  connection->link = *std::move(link);
  return Expect(connection->channel.get(), Body::kLinkReady, deadline).status();
}

}  // namespace

absl::StatusOr<SourceConnection> ConnectSource(Dialer* dialer, const GuestMemory* memory,
                                               const SessionRequest& request, absl::Time deadline) {
  SourceConnection connection;
  absl::StatusOr<std::unique_ptr<ControlChannel>> channel =
      DialControl(dialer, deadline, &connection.version);
  if (!channel.ok()) return channel.status();
  connection.channel = *std::move(channel);
  if (!request.domain.empty() && connection.version < kDomainVersion) {
    return absl::FailedPreconditionError(
        absl::StrCat("the presyncd of ", dialer->peer(),
                     " is too old for guests that libvirt manages: upgrade it"));
  }

  Body message;
  wire::OpenSession* open = message.mutable_open_session();
  open->set_session_id(IdToBytes(request.session));
  open->set_guest(request.guest);
  open->set_domain(request.domain);
  open->set_page_bytes(kPageBytes);
  open->set_tcp_streams(request.tcp_streams);
  for (const Region& region : memory->regions()) {
    wire::RegionSpec* spec = open->add_regions();
    spec->set_name(region.name());
    spec->set_size_bytes(region.size_bytes());
  }
  AddShape(request.shape, open);
  if (absl::Status s = connection.channel->Send(message, deadline); !s.ok()) return s;
  const absl::Time began = MonotonicNow();
  absl::StatusOr<Body> opened =
      Expect(connection.channel.get(), Body::kSessionOpened,
             std::max(deadline, began + OpenTimeout(*memory)), request.give_up);
  if (!opened.ok()) return opened.status();
  deadline += MonotonicNow() - began;  // the link has its own time
  connection.content = ToContent(opened->session_opened().content());
  connection.differences = TakeTexts(opened->session_opened().differences());
  connection.warnings = TakeTexts(opened->session_opened().warnings());
  request.on_content(connection.content);
  const absl::Status linked =
      connection.version >= kLinksVersion
          ? OpenFirstLink(dialer, memory, request, &connection, deadline)
          : OpenOnlyLink(dialer, memory, request, opened->session_opened(), &connection, deadline);
  if (!linked.ok()) return linked;
  return connection;
}

absl::Status FallToTcp(Dialer* dialer, const GuestMemory* memory, const SessionRequest& request,
                       SourceConnection* connection, std::unique_ptr<SourceLink>* failed,
                       absl::Time deadline) {
  ControlChannel* const channel = connection->channel.get();
  *failed = std::move(connection->link);
  connection->devices.clear();
  // What the failed link had under way may still be written there, until the target has closed it.
  const uint32_t old = connection->link_number;
  if (absl::Status s = channel->Send(MakeCloseLink(old), deadline); !s.ok()) return s;
  if (auto r = ExpectAbout(channel, Body::kLinkClosed, old, deadline); !r.ok()) return r.status();
  return LinkOpening(dialer, memory, request, connection).Open(wire::OpenLink::TCP, deadline);
}

absl::StatusOr<wire::Outcome> AskOutcome(Dialer* dialer, const SessionId& session,
                                         const std::string& guest, bool end_it,
                                         absl::Time deadline) {
  uint32_t version = 0;
  absl::StatusOr<std::unique_ptr<ControlChannel>> channel = DialControl(dialer, deadline, &version);
  if (!channel.ok()) return channel.status();
  Body message;
  message.mutable_query_outcome()->set_session_id(IdToBytes(session));
  message.mutable_query_outcome()->set_guest(guest);
  message.mutable_query_outcome()->set_end_it(end_it);
  if (absl::Status s = (*channel)->Send(message, deadline); !s.ok()) return s;
  absl::StatusOr<Body> outcome = Expect(channel->get(), Body::kOutcome, deadline);
  if (!outcome.ok()) return outcome.status();
  return outcome->outcome();
}

}  // namespace presync
