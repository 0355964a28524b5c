#include "transport/sync/target_links.h"

#include <algorithm>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "transport/clock.h"
#include "transport/sync/link_messages.h"
#include "transport/tcp/tcp_target_link.h"

namespace presync {
namespace {

constexpr absl::Duration kSendTimeout = absl::Seconds(5);
constexpr absl::Duration kStreamsTimeout = absl::Seconds(10);

}  // namespace

TargetLinks::TargetLinks(TargetService* service, ControlChannel* channel, const GuestMemory* memory,
                         std::string guest, std::function<void()> on_up)
    : service_(service),
      channel_(channel),
      memory_(memory),
      guest_(std::move(guest)),
      on_up_(std::move(on_up)) {}

TargetLinks::~TargetLinks() {
  if (absl::Status s = CloseAll(); !s.ok()) {
    service_->Log(true, absl::StrCat(guest_, ": ", s.message()));
  }
}

absl::Status TargetLinks::Send(const wire::ControlMessage& message) {
  return channel_->Send(message, MonotonicNow() + kSendTimeout);
}

void TargetLinks::Adopt(std::unique_ptr<TargetLink> link) {
  Entry& entry = entries_.emplace_back();
  MutexLock lock(&entry.mutex);
  entry.link = std::move(link);
}

absl::Status TargetLinks::Open(const wire::OpenLink& open) {
  const bool known = std::any_of(entries_.begin(), entries_.end(),
                                 [&](const Entry& entry) { return entry.number == open.link(); });
  if (open.link() == 0 || known || entries_.size() >= kMaxLinks) {
    return absl::InvalidArgumentError(
        absl::StrCat("link ", open.link(), " can't be opened: its number is taken, or there are ",
                     kMaxLinks, " links already"));
  }
  Entry& entry = entries_.emplace_back();
  entry.number = open.link();
  entry.opener = std::thread([this, &entry, open] { Bring(&entry, open); });
  return absl::OkStatus();
}

void TargetLinks::Bring(Entry* entry, const wire::OpenLink& open) {
  absl::Status status;
  switch (open.kind()) {
    case wire::OpenLink::TCP:
      status = BringTcp(entry, open.tcp_streams());
      break;
    case wire::OpenLink::RDMA:
      status = BringRdma(entry, open.queue_pairs());
      break;
    default:
      status = absl::UnimplementedError("this presync has no such kind of link");
  }
  if (status.ok() || entry->cancelled) return;
  service_->Log(
      true, absl::StrCat(guest_, ": link ", entry->number, " did not come up: ", status.message()));
  Send(MakeLinkRefused(entry->number, status)).IgnoreError();
}

// The link is there from now on: whoever closes the entry closes it.
absl::Status TargetLinks::Publish(Entry* entry, std::unique_ptr<TargetLink> link) {
  MutexLock lock(&entry->mutex);
  if (entry->cancelled) return absl::CancelledError("it was closed before it was up");
  entry->link = std::move(link);
  return absl::OkStatus();
}

absl::Status TargetLinks::BringTcp(Entry* entry, uint32_t streams) {
  if (streams < 1) return absl::InvalidArgumentError("a TCP link needs at least one stream");
  streams = std::min(streams, service_->options().max_tcp_streams);
  {
    MutexLock lock(&entry->mutex);
    if (entry->cancelled) return absl::CancelledError("it was closed before it was offered");
    entry->token = service_->ExpectStreams(streams, *channel_);
  }
  wire::ControlMessage message;
  wire::LinkOffer* offer = message.mutable_link_offer();
  offer->set_link(entry->number);
  offer->set_token(IdToBytes(entry->token));
  offer->set_tcp_streams(streams);
  const absl::Status sent = Send(message);
  bool encrypted = false;
  absl::StatusOr<std::unique_ptr<TargetLink>> link =
      TakeTcp(entry->token, MonotonicNow() + (sent.ok() ? kStreamsTimeout : absl::ZeroDuration()),
              &encrypted);
  if (!sent.ok()) return sent;
  if (!link.ok()) return link.status();
  if (absl::Status s = Publish(entry, *std::move(link)); !s.ok()) return s;
  on_up_();
  service_->Log(false, absl::StrCat(guest_, ": link ", entry->number, " is up: tcp, ", streams,
                                    " streams", encrypted ? ", TLS" : ""));
  return Send(MakeLinkReady(entry->number));
}

absl::StatusOr<std::unique_ptr<TargetLink>> TargetLinks::TakeTcp(const SessionToken& token,
                                                                 absl::Time deadline,
                                                                 bool* encrypted) {
  const TargetServiceOptions& options = service_->options();
  if (options.make_link != nullptr) return options.make_link(token, memory_, deadline);
  absl::StatusOr<std::vector<Connection>> connections = service_->TakeStreams(token, deadline);
  if (!connections.ok()) return connections.status();
  *encrypted = connections->front().encrypted();
  auto made = MakeStreams(*std::move(connections), options.socket);
  if (!made.ok()) return made.status();
  absl::StatusOr<std::unique_ptr<TcpTargetLink>> link =
      TcpTargetLink::Create(memory_, *std::move(made));
  if (!link.ok()) return link.status();
  return *std::move(link);
}

absl::Status TargetLinks::BringRdma(Entry* entry, uint32_t queue_pairs) {
  const RdmaTargetOptions& options = service_->options().rdma;
  if (!options.enabled) {
    return absl::UnimplementedError("RDMA is switched off in this host's configuration");
  }
  if (service_->options().require_encryption) {
    return absl::FailedPreconditionError(
        "this host requires encryption (require_encryption), and RDMA data is not encrypted");
  }
  RdmaListen listen = {.addresses = options.addresses,
                       .token = RandomId(),
                       .queue_pairs = std::clamp<uint32_t>(queue_pairs, 1, options.max_queue_pairs),
                       .progress = [entry](uint64_t, uint64_t) { return !entry->cancelled; }};
  if (listen.addresses.empty()) listen.addresses.push_back(channel_->local_address());
  absl::StatusOr<std::unique_ptr<RdmaTarget>> made = ListenRdma(memory_, listen);
  if (!made.ok()) return made.status();
  RdmaTarget* const link = made->get();  // lives until the entry is closed, which waits for us
  if (absl::Status s = Publish(entry, *std::move(made)); !s.ok()) return s;
  std::vector<std::string> devices;
  for (const RdmaEndpoint& endpoint : link->offer().endpoints) devices.push_back(endpoint.device);
  absl::Status status = Send(MakeOffer(entry->number, link->offer()));
  if (status.ok()) status = link->AwaitSource(MonotonicNow() + RdmaTimeout(*memory_));
  if (!status.ok()) {
    link->Close();
    return status;
  }
  on_up_();
  service_->Log(false, absl::StrCat(guest_, ": link ", entry->number, " is up: rdma over ",
                                    absl::StrJoin(devices, ", ")));
  return Send(MakeLinkReady(entry->number));
}

absl::Status TargetLinks::End(Entry* entry) {
  {
    MutexLock lock(&entry->mutex);
    entry->cancelled = true;
    service_->ForgetStreams(entry->token);
    if (entry->link != nullptr) entry->link->Close();
  }
  if (entry->opener.joinable()) entry->opener.join();
  MutexLock lock(&entry->mutex);
  if (entry->link == nullptr) return absl::OkStatus();
  entry->link->Close();
  const absl::Status health = entry->link->health();
  return absl::IsInternal(health) ? health : absl::OkStatus();
}

absl::Status TargetLinks::Close(uint32_t number) {
  const auto it = std::find_if(entries_.begin(), entries_.end(),
                               [&](const Entry& entry) { return entry.number == number; });
  if (it != entries_.end()) {
    if (absl::Status s = End(&*it); !s.ok()) return s;
    entries_.erase(it);
    service_->Log(false, absl::StrCat(guest_, ": link ", number, " is closed"));
  }
  return Send(MakeLinkClosed(number));
}

absl::Status TargetLinks::CloseAll() {
  absl::Status first;
  for (Entry& entry : entries_) first.Update(End(&entry));
  closed_.splice(closed_.end(), entries_);
  return first;
}

absl::Status TargetLinks::Check() {
  for (Entry& entry : entries_) {
    MutexLock lock(&entry.mutex);
    const absl::Status health = entry.link == nullptr ? absl::OkStatus() : entry.link->health();
    if (health.ok()) continue;
    if (absl::IsInvalidArgument(health) || entry.number == 0) return health;
    if (!entry.told) {
      service_->Log(true, absl::StrCat(guest_, ": link ", entry.number, ": ", health.message()));
    }
    entry.told = true;
  }
  return absl::OkStatus();
}

}  // namespace presync
