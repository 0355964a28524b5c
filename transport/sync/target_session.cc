#include "transport/sync/target_session.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <optional>
#include <string>
#include <thread>
#include <utility>

#include "absl/strings/str_cat.h"
#include "transport/sync/conversation.h"
#include "transport/sync/handover_record.h"
#include "transport/sync/page_hash.h"
#include "transport/sync/target_links.h"
#include "transport/tcp/tcp_target_link.h"
#include "transport/wire/version.h"

namespace presync {
namespace {

using Body = wire::ControlMessage;

constexpr absl::Duration kSendTimeout = absl::Seconds(5);
constexpr absl::Duration kStreamsTimeout = absl::Seconds(10);
constexpr absl::Duration kGuestTimeout = absl::Seconds(30);
// In a handover the source is busy with other things than pings: longer than its rounds and the
// standstill together may take.
constexpr absl::Duration kHandoverTimeout = absl::Minutes(3);
// A guest's name goes into messages and file names.
constexpr size_t kMaxNameBytes = 128;
constexpr int kMaxRegions = 256;
constexpr uint64_t kMaxRegionBytes = uint64_t{1} << 43;  // 8 TiB
// Device state that is staged: QEMU's is some hundred KB, with video RAM some tens of MB.
constexpr uint64_t kMaxStateBytes = uint64_t{1} << 30;
constexpr size_t kMaxHashReplyBytes = 512 << 10;

bool IsPlainName(const std::string& name) {
  return !name.empty() && name.size() <= kMaxNameBytes && name[0] != '.' &&
         std::all_of(name.begin(), name.end(), [](unsigned char c) {
           return std::isalnum(c) != 0 || c == '-' || c == '_' || c == '.';
         });
}

absl::Status CheckRequest(const wire::OpenSession& open) {
  if (!IsPlainName(open.guest())) {
    return absl::InvalidArgumentError(
        "a guest's name has letters, digits, '-', '_' and '.', at most 128 of them");
  }
  if (open.page_bytes() != kPageBytes) {
    return absl::InvalidArgumentError(
        absl::StrCat("pages of ", open.page_bytes(), " bytes; this host has ", kPageBytes));
  }
  if (open.regions_size() < 1 || open.regions_size() > kMaxRegions) {
    return absl::InvalidArgumentError("a session needs memory regions");
  }
  for (const wire::RegionSpec& region : open.regions()) {
    if (!IsPlainName(region.name()) || region.size_bytes() == 0 ||
        region.size_bytes() > kMaxRegionBytes || region.size_bytes() % kPageBytes != 0) {
      return absl::InvalidArgumentError("a memory region has a bad name or size");
    }
  }
  return absl::OkStatus();
}

// Writes all of `bytes` to a pipe or socket whose reader is a loading guest.
absl::Status WriteAll(int fd, absl::string_view bytes, absl::Time deadline) {
  while (!bytes.empty()) {
    const ssize_t n = ::write(fd, bytes.data(), bytes.size());
    if (n > 0) {
      bytes.remove_prefix(static_cast<size_t>(n));
      continue;
    }
    if (errno == EINTR) continue;
    if (errno != EAGAIN) {
      return absl::UnavailableError(
          absl::StrCat("the waiting guest does not take its device state: ", std::strerror(errno)));
    }
    const int64_t left_ms = absl::ToInt64Milliseconds(deadline - absl::Now());
    pollfd p = {.fd = fd, .events = POLLOUT, .revents = 0};
    if (left_ms <= 0 || ::poll(&p, 1, static_cast<int>(left_ms)) <= 0) {
      return absl::DeadlineExceededError("the waiting guest does not take its device state");
    }
  }
  return absl::OkStatus();
}

class Conversation {
 public:
  Conversation(TargetService* service, ControlChannel* channel)
      : service_(service), channel_(channel) {}

  void Run();

 private:
  absl::Status Open(const wire::OpenSession& open);
  absl::Status OpenTcpLink(uint32_t streams, Body opened);
  absl::StatusOr<wire::SessionOpened::Content> PreparePlace(const wire::OpenSession& open);
  absl::Status ReserveRecord();
  absl::Status Serve();
  absl::Status Handle(const Body& message);
  absl::Status BeginHandover();
  absl::Status TakeState(const wire::StateChunk& chunk);
  absl::Status AnswerHashes(const wire::HashRequest& request);
  void FinishHashing();
  absl::Status Load(const wire::Load& load);
  absl::Status RunGuest();
  void AbortHandover();
  void End(const absl::Status& why);

  absl::Status Send(const Body& message) {
    return channel_->Send(message, absl::Now() + kSendTimeout);
  }

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
  uint64_t state_bytes_ = 0;
  std::thread hasher_;
  bool loading_ =
      false;  // bytes saved after the stop were given to the guest: it may have written its RAM
  bool loaded_ = false;
  bool forget_ = false;
  bool over_ = false;
};

void Conversation::Run() {
  const absl::Time deadline = absl::Now() + service_->options().preamble_timeout;
  absl::StatusOr<uint32_t> version = ExchangeHello(channel_, deadline);
  if (!version.ok()) {
    Send(MakeRefused(version.status())).IgnoreError();
    service_->Log(true, absl::StrCat(channel_->peer(), ": ", version.status().message()));
    return;
  }
  version_ = *version;
  absl::StatusOr<Body> first = channel_->Receive(deadline);
  if (!first.ok()) return;
  if (first->body_case() == Body::kQueryOutcome) {
    Body reply;
    const absl::StatusOr<SessionId> id = IdFromBytes(first->query_outcome().session_id());
    if (id.ok()) *reply.mutable_outcome() = service_->Outcome(*id, first->query_outcome().guest());
    reply.mutable_outcome();
    Send(reply).IgnoreError();
    return;
  }
  absl::Status status = first->body_case() == Body::kOpenSession
                            ? Open(first->open_session())
                            : absl::InvalidArgumentError("a conversation opens a session first");
  if (status.ok()) status = Serve();
  End(status);
}

absl::Status Conversation::Open(const wire::OpenSession& open) {
  if (absl::Status s = CheckRequest(open); !s.ok()) return s;
  const absl::StatusOr<SessionId> id = IdFromBytes(open.session_id());
  if (!id.ok()) return id.status();
  absl::StatusOr<TargetSlot*> slot = service_->AcquireSlot(*id, open.guest(), channel_);
  if (!slot.ok()) return slot.status();
  slot_ = *slot;

  absl::StatusOr<wire::SessionOpened::Content> content = PreparePlace(open);
  if (!content.ok()) {
    forget_ = true;
    return content.status();
  }
  if (absl::Status s = ReserveRecord(); !s.ok()) return s;
  service_->Log(false,
                absl::StrCat(slot_->guest, ": mirroring from ", channel_->peer(), ", ",
                             slot_->place->memory().pages() * (kPageBytes >> 10) >> 10, " MiB"));
  links_ = std::make_unique<TargetLinks>(service_, channel_, &slot_->place->memory(), slot_->guest,
                                         [slot = slot_] { slot->content_kept = true; });
  Body opened;
  opened.mutable_session_opened()->set_content(*content);
  return version_ >= kLinksVersion ? Send(opened)
                                   : OpenTcpLink(open.tcp_streams(), std::move(opened));
}

// Version 1: one TCP link, which comes with the session.
absl::Status Conversation::OpenTcpLink(uint32_t streams, Body opened) {
  streams = std::min(streams, service_->options().max_tcp_streams);
  const SessionToken token = service_->ExpectStreams(streams);
  opened.mutable_session_opened()->set_token(IdToBytes(token));
  opened.mutable_session_opened()->set_tcp_streams(streams);
  const absl::Status sent = Send(opened);
  absl::StatusOr<std::vector<UniqueFd>> sockets = service_->TakeStreams(
      token, absl::Now() + (sent.ok() ? kStreamsTimeout : absl::ZeroDuration()));
  if (!sent.ok()) return sent;
  if (!sockets.ok()) return sockets.status();
  absl::StatusOr<std::unique_ptr<TcpTargetLink>> link = TcpTargetLink::Create(
      &slot_->place->memory(), *std::move(sockets), service_->options().socket);
  if (!link.ok()) return link.status();
  links_->Adopt(*std::move(link));
  slot_->content_kept = true;
  Body ready;
  ready.mutable_link_ready();
  return Send(ready);
}

// Memory and waiting guest: those of the session if it comes back, else new ones.
absl::StatusOr<wire::SessionOpened::Content> Conversation::PreparePlace(
    const wire::OpenSession& open) {
  std::vector<RegionRequest> regions;
  for (const wire::RegionSpec& spec : open.regions()) {
    regions.push_back({spec.name(), spec.size_bytes()});
  }
  wire::SessionOpened::Content content = wire::SessionOpened::KEPT;
  if (slot_->place == nullptr || !slot_->content_kept) {
    slot_->place.reset();
    absl::StatusOr<std::unique_ptr<TargetPlace>> place =
        service_->host()->MakePlace(open.guest(), regions);
    if (!place.ok()) return place.status();
    slot_->place = *std::move(place);
    content =
        slot_->place->memory_was_zero() ? wire::SessionOpened::ZERO : wire::SessionOpened::UNKNOWN;
  }
  const absl::Span<const Region> here = slot_->place->memory().regions();
  for (size_t i = 0; i < std::max(here.size(), regions.size()); ++i) {
    if (i >= here.size() || i >= regions.size() || here[i].name() != regions[i].name ||
        here[i].size_bytes() != regions[i].size_bytes) {
      return absl::FailedPreconditionError(
          "the session came back with other memory regions than it began with");
    }
  }
  if (absl::StatusOr<TargetGuest*> guest = slot_->place->Waiting(absl::Now() + kGuestTimeout);
      !guest.ok()) {
    return guest.status();
  }
  return content;
}

// Ahead of any handover, which has to write it while it is timed.
absl::Status Conversation::ReserveRecord() {
  absl::StatusOr<HandoverRecord> record = HandoverRecord::Reserve(
      service_->options().record_folder, {.role = HandoverRole::kTarget,
                                          .phase = HandoverPhase::kWaiting,
                                          .guest = slot_->guest,
                                          .session = slot_->session,
                                          .peer = channel_->peer(),
                                          .detail = slot_->place->address()});
  if (!record.ok()) return record.status();
  record_ = *std::move(record);
  return absl::OkStatus();
}

absl::Status Conversation::Serve() {
  while (!over_) {
    absl::StatusOr<Body> message = channel_->Receive(
        absl::Now() + (guest_ == nullptr ? service_->options().idle_timeout : kHandoverTimeout));
    if (!message.ok()) {
      if (!absl::IsDeadlineExceeded(message.status())) return message.status();
      return absl::UnavailableError(absl::StrCat(channel_->peer(), " fell silent"));
    }
    if (absl::Status s = Handle(*message); !s.ok()) return s;
    if (absl::Status s = links_->Check(); !s.ok()) return s;
  }
  return absl::OkStatus();
}

absl::Status Conversation::Handle(const Body& message) {
  switch (message.body_case()) {
    case Body::kPing: {
      if (!loaded_) {
        if (absl::Status s = slot_->place->Check(); !s.ok()) return s;
      }
      Body pong;
      pong.mutable_pong()->set_sequence(message.ping().sequence());
      return Send(pong);
    }
    case Body::kOpenLink:
      if (version_ < kLinksVersion || guest_ != nullptr) break;
      return links_->Open(message.open_link());
    case Body::kCloseLink:
      if (version_ < kLinksVersion) break;
      return links_->Close(message.close_link().link());
    case Body::kBeginHandover:
      return BeginHandover();
    case Body::kStateChunk:
      return TakeState(message.state_chunk());
    case Body::kHashRequest:
      return AnswerHashes(message.hash_request());
    case Body::kLoad:
      return Load(message.load());
    case Body::kRun:
      return RunGuest();
    case Body::kAbortHandover:
      service_->Log(true, absl::StrCat(slot_->guest, ": the source called the handover off: ",
                                       PrintableText(message.abort_handover().reason())));
      AbortHandover();
      return absl::OkStatus();
    case Body::kCloseSession:
      service_->Log(false, absl::StrCat(slot_->guest, ": the source ended the sync"));
      forget_ = over_ = true;
      return absl::OkStatus();
    default:
      break;
  }
  return absl::InvalidArgumentError(
      absl::StrCat("message ", message.body_case(), " does not fit here"));
}

absl::Status Conversation::BeginHandover() {
  if (guest_ != nullptr) return absl::FailedPreconditionError("a handover is already under way");
  absl::StatusOr<TargetGuest*> guest = slot_->place->Waiting(absl::Now() + kGuestTimeout);
  if (!guest.ok()) return guest.status();
  if (absl::Status s = record_->Append(HandoverPhase::kWaiting); !s.ok()) return s;
  guest_ = *guest;
  absl::StatusOr<UniqueFd> stream = (*guest)->BeginLoad(absl::Now() + kGuestTimeout);
  if (!stream.ok()) return stream.status();
  state_stream_ = *std::move(stream);
  ::fcntl(state_stream_.get(), F_SETFL, ::fcntl(state_stream_.get(), F_GETFL) | O_NONBLOCK);
  service_->SetSlotState(slot_, "handover");
  Body ready;
  ready.mutable_handover_ready();
  return Send(ready);
}

// Live state is loaded as it comes; staged state waits, for loading it reads guest RAM.
absl::Status Conversation::TakeState(const wire::StateChunk& chunk) {
  if (guest_ == nullptr || loading_) {
    return absl::InvalidArgumentError("device state came outside a handover");
  }
  state_bytes_ += chunk.data().size();
  if (chunk.staged() || !staged_.empty()) {
    if (staged_.size() + chunk.data().size() > kMaxStateBytes) {
      return absl::InvalidArgumentError("the device state is too long");
    }
    staged_ += chunk.data();
    return absl::OkStatus();
  }
  return WriteAll(state_stream_.get(), chunk.data(), absl::Now() + kGuestTimeout);
}

absl::Status Conversation::AnswerHashes(const wire::HashRequest& request) {
  HashPlan plan = {.run = {request.first_page(), request.pages()},
                   .pages_per_hash = std::max(1u, request.pages_per_hash()),
                   .only = {request.only().begin(), request.only().end()}};
  if (plan.hashes() * kHashBytes > kMaxHashReplyBytes) {
    return absl::InvalidArgumentError("too many hashes were asked for at once");
  }
  // In a thread of its own, so that the device state can be loaded meanwhile; one at a time.
  FinishHashing();
  hasher_ = std::thread([this, plan = std::move(plan)] {
    absl::StatusOr<std::string> hashes = HashPages(slot_->place->memory(), plan);
    Body reply;
    if (hashes.ok()) {
      reply.mutable_hash_reply()->set_first_page(plan.run.first);
      *reply.mutable_hash_reply()->mutable_hashes() = *std::move(hashes);
    } else {
      reply = MakeRefused(hashes.status());
    }
    Send(reply).IgnoreError();  // the receiving side notices a connection that is gone
  });
  return absl::OkStatus();
}

void Conversation::FinishHashing() {
  if (hasher_.joinable()) hasher_.join();
}

absl::Status Conversation::Load(const wire::Load& load) {
  if (guest_ == nullptr || loading_ || load.state_bytes() != state_bytes_) {
    return absl::InvalidArgumentError("the order to load does not match the device state received");
  }
  // Nothing of the network's may touch the guest's memory from here on.
  if (absl::Status s = links_->CloseAll(); !s.ok()) return s;
  loading_ = true;
  slot_->content_kept = false;
  const absl::Time deadline = absl::Now() + kGuestTimeout;
  if (absl::Status s = WriteAll(state_stream_.get(), staged_, deadline); !s.ok()) return s;
  state_stream_.reset();
  if (absl::Status s = guest_->AwaitLoaded(deadline); !s.ok()) return s;
  loaded_ = true;
  Body loaded;
  loaded.mutable_loaded();
  return Send(loaded);
}

// The source has given the guest up. From the record on it is this host's.
absl::Status Conversation::RunGuest() {
  if (!loaded_)
    return absl::InvalidArgumentError("the order to run came before everything was loaded");
  FinishHashing();
  if (absl::Status s = record_->Append(HandoverPhase::kToldToRun); !s.ok()) return s;
  const absl::Time deadline = absl::Now() + kGuestTimeout;
  absl::Status run = guest_->Run(deadline);
  Body answer;
  if (run.ok()) {
    answer.mutable_running();
    Send(answer).IgnoreError();  // if it is lost the source asks; the record knows
    slot_->place->Keep();
    record_->Append(HandoverPhase::kRunning).IgnoreError();
    service_->Log(false, absl::StrCat(slot_->guest, ": runs here now"));
  } else if (absl::IsFailedPrecondition(run) && record_->Append(HandoverPhase::kWaiting).ok()) {
    // It refused, or had ended before. The order is taken back first: a record that still says so
    // when its QEMU is gone would have the source end its own, and the guest would be nowhere.
    if (absl::Status s = slot_->place->EndWaiting(); !s.ok()) {
      service_->Log(true, absl::StrCat(slot_->guest, ": ", s.message()));
      return s;  // the source asks, and is answered once that QEMU is gone
    }
    // If this can't be written, the answer has to be enough: after it the source does not ask.
    record_->Append(HandoverPhase::kNeverRan).IgnoreError();
    answer.mutable_outcome()->set_value(wire::Outcome::NEVER_RAN);
    answer.mutable_outcome()->set_text(std::string(run.message()));
    Send(answer).IgnoreError();
    service_->Log(true, absl::StrCat(slot_->guest, ": could not be run: ", run.message()));
  } else {
    slot_->place->Keep();
    service_->Log(true, absl::StrCat(slot_->guest,
                                     ": was told to run, and whether it does is not "
                                     "known: ",
                                     run.message(), ". Look at ", slot_->place->address()));
  }
  forget_ = over_ = true;
  return absl::OkStatus();
}

// The guest goes on at the source. The waiting one has eaten a part of the state: a new one must
// wait.
void Conversation::AbortHandover() {
  over_ = true;
  if (guest_ == nullptr) return;
  guest_ = nullptr;
  // Only a process that is certainly gone never ran; otherwise the record stays open, and Outcome
  // decides.
  const absl::Status ended = slot_->place->EndWaiting();
  if (ended.ok()) {
    record_->Append(HandoverPhase::kNeverRan).IgnoreError();
  } else {
    service_->Log(true, absl::StrCat(slot_->guest, ": ", ended.message()));
  }
}

void Conversation::End(const absl::Status& why) {
  if (slot_ == nullptr) {
    if (!why.ok()) {
      service_->Log(true, absl::StrCat("refused ", channel_->peer(), ": ", why.message()));
      Send(MakeRefused(why)).IgnoreError();
    }
    return;
  }
  if (!why.ok()) {
    service_->Log(true, absl::StrCat(slot_->guest, ": ", why.message()));
    Send(MakeRefused(why)).IgnoreError();
  }
  FinishHashing();
  links_.reset();
  // Whatever ended the conversation, an order to run can't come any more: the guest never runs
  // here.
  if (!over_ && guest_ != nullptr) AbortHandover();
  if (record_ && !record_->used()) record_->Remove().IgnoreError();
  service_->ReleaseSlot(slot_, forget_);
}

}  // namespace

void RunTargetConversation(TargetService* service, ControlChannel* channel) {
  Conversation(service, channel).Run();
}

}  // namespace presync
