// One conversation of the source with the target: from the first byte to a link that works, and
// from one link to the next.
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "transport/guest.h"
#include "transport/link.h"
#include "transport/memory.h"
#include "transport/rdma/rdma_options.h"
#include "transport/sync/dialer.h"
#include "transport/sync/session_id.h"
#include "transport/sync/source_sync.h"
#include "transport/tcp/byte_stream.h"
#include "transport/tcp/tcp_options.h"
#include "transport/wire/control_channel.h"

namespace presync {

// Which kind of link carries the pages. kAuto: RDMA where both hosts have it, else TCP.
enum class Transport { kAuto, kRdma, kTcp };

// Brings up the source's end of a link that stands in for TCP, once the target has offered it under
// this token. For tests of sessions over a link of their own.
using MakeSourceLink = std::function<absl::StatusOr<std::unique_ptr<SourceLink>>(
    const SessionId& token, absl::Time deadline)>;

// What the source asks for when it connects.
struct SessionRequest {
  SessionId session = {};
  std::string guest;
  std::string domain;  // libvirt's UUID of a guest that libvirt manages; else empty
  uint32_t tcp_streams = 4;
  TcpSourceOptions tcp;
  SocketOptions socket;
  Transport transport = Transport::kAuto;
  std::string tcp_reason = "TCP was asked for";  // for people, with kTcp
  RdmaSourceOptions rdma;
  MakeSourceLink make_link = nullptr;  // null: TCP connections
  GuestShape shape;                    // for the target to compare with; empty: nothing is compared
  // Told what the target's memory holds as soon as the target says it: it says so once, and a
  // connection that breaks before its link is up changes nothing about that.
  std::function<void(SourceSync::TargetContent)> on_content = [](SourceSync::TargetContent) {};
  // Asked while the target makes ready, which may take long: true ends the waiting.
  std::function<bool()> give_up = [] { return false; };
};

struct SourceConnection {
  std::unique_ptr<ControlChannel> channel;
  std::unique_ptr<SourceLink> link;
  SourceSync::TargetContent content = SourceSync::TargetContent::kUnknown;
  std::vector<std::string> devices;  // of the link, by name; none for TCP
  std::string why;                   // why it is this kind of link, for people
  std::string rdma_problem;          // why RDMA could not be had, where it was tried
  // How the guest that waits there would differ from this one: a launch would fail of these, and
  // would not notice those.
  std::vector<std::string> differences, warnings;
  uint32_t version = 0;       // of the conversation
  uint32_t link_number = 0;   // of `link`
  uint32_t links_opened = 0;  // the next one's number is one more
};

// Connects, agrees on a version, opens the session and brings up a link. Blocks until then or
// `deadline`; longer by the time that the target needs for the guest's memory and for its QEMU, and
// with RDMA by what registering the guest's memory takes (RdmaTimeout). CANCELLED: given up. kAuto
// takes TCP when RDMA can't be had, and `why` says so. Errors: those of Dialer and ControlChannel;
// whatever the target refused with; with kRdma those of ConnectRdma.
absl::StatusOr<SourceConnection> ConnectSource(Dialer* dialer, const GuestMemory* memory,
                                               const SessionRequest& request, absl::Time deadline);

// Replaces the connection's link, which has failed and must not be in use any more, by a TCP link
// within the same conversation. The target has closed the failed one, so that nothing late is
// written through it, before this returns. `failed` becomes the old link: destroying it may take
// its time. Errors: the conversation is over too.
absl::Status FallToTcp(Dialer* dialer, const GuestMemory* memory, const SessionRequest& request,
                       SourceConnection* connection, std::unique_ptr<SourceLink>* failed,
                       absl::Time deadline);

// Asks the target what became of a session that was given up. `end_it`: a person says that the
// guest goes on here; a target that was told to run it, and does not, ends it. Errors as above.
absl::StatusOr<wire::Outcome> AskOutcome(Dialer* dialer, const SessionId& session,
                                         const std::string& guest, bool end_it,
                                         absl::Time deadline);

}  // namespace presync
