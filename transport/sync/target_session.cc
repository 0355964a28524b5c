#include "transport/sync/target_session.h"

#include <algorithm>
#include <memory>
#include <string>
#include <utility>

#include "absl/strings/str_cat.h"
#include "transport/clock.h"
#include "transport/printable.h"
#include "transport/sync/conversation.h"
#include "transport/sync/target_conversation.h"
#include "transport/tcp/tcp_target_link.h"
#include "transport/wire/version.h"

namespace presync {
namespace {

using Body = wire::ControlMessage;

constexpr absl::Duration kStreamsTimeout = absl::Seconds(10);
// In a handover the source is busy with other things than pings: longer than its rounds and the
// standstill together may take.
constexpr absl::Duration kHandoverTimeout = absl::Minutes(3);
// Some ten questions to a QEMU that has nothing else to do.
constexpr absl::Duration kCompareTimeout = absl::Seconds(5);
constexpr int kMaxRegions = 256;
constexpr uint64_t kMaxRegionBytes = uint64_t{1} << 43;  // 8 TiB

// As libvirt writes them: it becomes part of file names.
bool IsUuid(const std::string& text) {
  if (text.size() != 36) return false;
  for (size_t i = 0; i < text.size(); ++i) {
    const bool dash = i == 8 || i == 13 || i == 18 || i == 23;
    const auto c = static_cast<unsigned char>(text[i]);
    if (dash ? c != '-' : std::isxdigit(c) == 0 || std::isupper(c) != 0) return false;
  }
  return true;
}

absl::Status CheckRequest(const wire::OpenSession& open) {
  if (!IsPlainName(open.guest())) {
    return absl::InvalidArgumentError(
        "a guest's name has letters, digits, '-', '_' and '.', at most 128 of them");
  }
  if (!open.domain().empty() && !IsUuid(open.domain())) {
    return absl::InvalidArgumentError("a domain is named by its UUID");
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
  if (open.shape_size() > kMaxTraits) {
    return absl::InvalidArgumentError("a guest's shape has too many traits");
  }
  for (const wire::Trait& trait : open.shape()) {
    if (trait.key().size() > kMaxTraitBytes || trait.value().size() > kMaxTraitBytes) {
      return absl::InvalidArgumentError("a trait of a guest is too long");
    }
  }
  return absl::OkStatus();
}

// Whether there is a place, with these regions.
bool Fits(const TargetPlace* place, const std::vector<RegionRequest>& regions) {
  if (place == nullptr) return false;
  const absl::Span<const Region> here = place->memory().regions();
  return std::equal(here.begin(), here.end(), regions.begin(), regions.end(),
                    [](const Region& region, const RegionRequest& wanted) {
                      return region.name() == wanted.name &&
                             region.size_bytes() == wanted.size_bytes;
                    });
}

// Handovers of `guest` to this host whose records are not settled.
std::vector<HandoverEntry> OpenHandovers(const std::string& folder, const std::string& guest) {
  std::vector<std::string> unreadable;
  std::vector<HandoverEntry> entries = HandoverRecord::ReadAll(folder, &unreadable);
  std::erase_if(entries, [&guest](const HandoverEntry& entry) {
    return entry.guest != guest ||
           (entry.phase != HandoverPhase::kWaiting && entry.phase != HandoverPhase::kToldToRun);
  });
  return entries;
}

}  // namespace

bool IsPlainName(absl::string_view name) {
  constexpr size_t kMaxNameBytes = 128;
  return !name.empty() && name.size() <= kMaxNameBytes && name[0] != '.' &&
         std::all_of(name.begin(), name.end(), [](unsigned char c) {
           return std::isalnum(c) != 0 || c == '-' || c == '_' || c == '.';
         });
}

void TargetConversation::Run() {
  const absl::Time deadline = MonotonicNow() + service_->options().preamble_timeout;
  absl::StatusOr<uint32_t> version = ExchangeHello(channel_, deadline);
  if (!version.ok()) {
    Send(MakeRefused(version.status())).IgnoreError();
    service_->LogRefusal(*channel_, version.status());
    return;
  }
  version_ = *version;
  absl::StatusOr<Body> first = channel_->Receive(deadline);
  if (!first.ok()) return;
  // Only now, so that the answer is read: somebody who is known is told why.
  if (absl::Status s = service_->CheckPeer(*channel_); !s.ok()) return End(s);
  if (first->body_case() == Body::kQueryOutcome) {
    Body reply;
    const absl::StatusOr<SessionId> id = IdFromBytes(first->query_outcome().session_id());
    if (id.ok())
      *reply.mutable_outcome() =
          service_->Outcome(*id, first->query_outcome().guest(), channel_->peer_name(),
                            first->query_outcome().end_it());
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

absl::Status TargetConversation::Open(const wire::OpenSession& open) {
  if (absl::Status s = CheckRequest(open); !s.ok()) return s;
  const absl::StatusOr<SessionId> id = IdFromBytes(open.session_id());
  if (!id.ok()) return id.status();
  if (absl::Status s = CheckRecords(*id); !s.ok()) return s;
  uint64_t bytes = 0;
  for (const wire::RegionSpec& region : open.regions()) bytes += region.size_bytes();
  absl::StatusOr<TargetSlot*> slot = service_->AcquireSlot(*id, open.guest(), bytes, channel_);
  if (!slot.ok()) return slot.status();
  slot_ = *slot;
  if (absl::Status s = CloseOlderHandovers(); !s.ok()) return s;

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
                                         [this] { OnLinkUp(); });
  Body opened;
  opened.mutable_session_opened()->set_content(*content);
  CompareShape(open, opened.mutable_session_opened());
  return version_ >= kLinksVersion ? Send(opened)
                                   : OpenTcpLink(open.tcp_streams(), std::move(opened));
}

// Says how the guest that waits here differs from the one that is to come: what follows is for the
// source to decide.
void TargetConversation::CompareShape(const wire::OpenSession& open, wire::SessionOpened* opened) {
  GuestShape shape;
  for (const wire::Trait& trait : open.shape()) {
    shape.push_back({PrintableText(trait.key()), PrintableText(trait.value())});
  }
  if (shape.empty()) return;
  const ShapeComparison compared = slot_->place->Compare(shape, MonotonicNow() + kCompareTimeout);
  for (const std::string& text : compared.differences) {
    if (opened->differences_size() < kMaxShapeTexts) opened->add_differences(text);
    service_->Log(true, absl::StrCat(slot_->guest, ": does not fit: ", text));
  }
  for (const std::string& text : compared.warnings) {
    if (opened->warnings_size() < kMaxShapeTexts) opened->add_warnings(text);
  }
}

// What waits at the guest's address from now on is this session's. A record of an earlier one that
// is still open would have recovery end it, or run it, in that one's name.
absl::Status TargetConversation::CloseOlderHandovers() {
  for (const HandoverEntry& entry :
       OpenHandovers(service_->options().record_folder, slot_->guest)) {
    if (entry.session == slot_->session) continue;
    if (entry.phase == HandoverPhase::kToldToRun) {
      return absl::FailedPreconditionError(
          absl::StrCat("an earlier handover of ", slot_->guest,
                       " to this host is open: it was told to run here; presync status here says "
                       "what to do"));
    }
    if (slot_->place != nullptr) {
      if (absl::Status s = slot_->place->EndWaiting(); !s.ok()) return s;
    }
    if (absl::Status s = service_->EndForGood(entry); !s.ok()) {
      return absl::Status(s.code(), absl::StrCat("an earlier handover of ", slot_->guest,
                                                 " to this host is open: ", s.message()));
    }
  }
  return absl::OkStatus();
}

// From now on the source counts on what it has confirmed. Any thread.
void TargetConversation::OnLinkUp() {
  slot_->content_kept = true;
  slot_->older_copy = false;
  const absl::Status noted = slot_->place->NoteCopy({.guest = slot_->guest,
                                                     .session = slot_->session,
                                                     .peer = channel_->peer(),
                                                     .peer_name = channel_->peer_name()});
  slot_->noted = noted.ok();
  if (noted.ok() || absl::IsUnimplemented(noted)) return;
  service_->Log(true, absl::StrCat(slot_->guest,
                                   ": its copy will not outlive this presyncd: ", noted.message()));
}

// Version 1: one TCP link, which comes with the session.
absl::Status TargetConversation::OpenTcpLink(uint32_t streams, Body opened) {
  streams = std::min(streams, service_->options().max_tcp_streams);
  const SessionToken token = service_->ExpectStreams(streams, *channel_);
  opened.mutable_session_opened()->set_token(IdToBytes(token));
  opened.mutable_session_opened()->set_tcp_streams(streams);
  const absl::Status sent = Send(opened);
  absl::StatusOr<std::vector<Connection>> connections = service_->TakeStreams(
      token, MonotonicNow() + (sent.ok() ? kStreamsTimeout : absl::ZeroDuration()));
  if (!sent.ok()) return sent;
  if (!connections.ok()) return connections.status();
  auto made = MakeStreams(*std::move(connections), service_->options().socket);
  if (!made.ok()) return made.status();
  absl::StatusOr<std::unique_ptr<TcpTargetLink>> link =
      TcpTargetLink::Create(&slot_->place->memory(), *std::move(made));
  if (!link.ok()) return link.status();
  links_->Adopt(*std::move(link));
  OnLinkUp();
  Body ready;
  ready.mutable_link_ready();
  return Send(ready);
}

// Memory and waiting guest: those of the session if it comes back, or of an earlier one of the same
// guest; else new ones.
absl::StatusOr<wire::SessionOpened::Content> TargetConversation::PreparePlace(
    const wire::OpenSession& open) {
  std::vector<RegionRequest> regions;
  for (const wire::RegionSpec& spec : open.regions()) {
    regions.push_back({spec.name(), spec.size_bytes()});
  }
  // A place is one domain's, or none's: another guest of the same name does not get it.
  if (slot_->domain != open.domain()) slot_->content_kept = false;
  slot_->domain = open.domain();
  if (slot_->place != nullptr && slot_->content_kept) {
    if (!slot_->place->Check().ok()) {
      if (absl::Status s = slot_->place->EndWaiting(); !s.ok()) return s;
    }
    LookAtCopy().IgnoreError();  // and then what is found is not taken for what it was
  }
  wire::SessionOpened::Content content = wire::SessionOpened::KEPT;
  if (slot_->older_copy) {
    content = wire::SessionOpened::COPY;
    // Whoever can't tell what of it is right gets new memory.
    if (version_ < kHashesVersion || !Fits(slot_->place.get(), regions)) {
      slot_->content_kept = false;
    }
  }
  if (slot_->place == nullptr || !slot_->content_kept) {
    slot_->place.reset();
    slot_->older_copy = slot_->noted = false;
    absl::StatusOr<std::unique_ptr<TargetPlace>> place =
        open.domain().empty()
            ? service_->host()->MakePlace(open.guest(), regions)
            : service_->host()->MakeDomainPlace(open.guest(), open.domain(), regions);
    if (!place.ok()) return place.status();
    slot_->place = *std::move(place);
    slot_->reserved = slot_->place->memory().IsWhole();
    content =
        slot_->place->memory_was_zero() ? wire::SessionOpened::ZERO : wire::SessionOpened::UNKNOWN;
  }
  // Of an older copy, too: the list may be another one by now.
  if (const PeerRules* rules = service_->RulesOf(*channel_); rules != nullptr) {
    if (absl::Status s = CheckFolders(*rules, slot_->place->memory()); !s.ok()) return s;
  }
  if (!Fits(slot_->place.get(), regions)) {
    return absl::FailedPreconditionError(
        "the session came back with other memory regions than it began with");
  }
  if (absl::StatusOr<TargetGuest*> guest = slot_->place->Waiting(MonotonicNow() + kGuestTimeout);
      !guest.ok()) {
    return guest.status();
  }
  return content;
}

// Whether the memory still holds what the links wrote, as far as can be told at once. Else the
// copy is what the next conversation finds: one to be proven, or none.
absl::Status TargetConversation::LookAtCopy() {
  if (slot_->reserved && !slot_->place->memory().IsWhole()) {
    slot_->content_kept = slot_->noted = false;
    slot_->place->ForgetCopy().IgnoreError();
    return absl::UnavailableError(
        absl::StrCat("memory of its copy was freed, though not by presync (by a QEMU with "
                     "discard-data=on that ended, or by hand): it is copied anew"));
  }
  if (slot_->place->TakeUnknown()) {
    slot_->older_copy = true;
    return absl::UnavailableError("the QEMU that waited has ended by itself: its copy is proven");
  }
  return absl::OkStatus();
}

// A record is needed until its source can't ask any more, so none goes to make room for another.
absl::Status TargetConversation::CheckRecords(const SessionId& session) {
  const std::string peer = channel_->peer_name();
  const std::vector<TargetStatus> here = service_->status();
  const bool goes_on = std::any_of(here.begin(), here.end(), [&](const TargetStatus& status) {
    return status.session == IdToHex(session);
  });
  std::vector<std::string> unreadable;
  const std::vector<HandoverEntry> entries =
      HandoverRecord::ReadAll(service_->options().record_folder, &unreadable);
  const auto kept = std::count_if(entries.begin(), entries.end(), [&](const HandoverEntry& entry) {
    return entry.role == HandoverRole::kTarget && entry.peer_name == peer;
  });
  if (goes_on || kept < service_->options().max_records_of_a_peer) return absl::OkStatus();
  return absl::ResourceExhaustedError(
      absl::StrCat(kept,
                   " handovers from this peer are on record here, which is as many as may "
                   "be; each is kept for a week after it is settled, so this has to wait"));
}

// Ahead of any handover, which has to write it while it is timed.
absl::Status TargetConversation::ReserveRecord() {
  absl::StatusOr<HandoverRecord> record = HandoverRecord::Reserve(
      service_->options().record_folder, {.role = HandoverRole::kTarget,
                                          .phase = HandoverPhase::kWaiting,
                                          .guest = slot_->guest,
                                          .session = slot_->session,
                                          .peer = channel_->peer(),
                                          .peer_name = channel_->peer_name(),
                                          .detail = slot_->place->address()});
  if (!record.ok()) return record.status();
  record_ = *std::move(record);
  return absl::OkStatus();
}

absl::Status TargetConversation::Serve() {
  while (!over_) {
    absl::StatusOr<Body> message = channel_->Receive(
        MonotonicNow() + (guest_ == nullptr ? service_->options().idle_timeout : kHandoverTimeout));
    if (!message.ok()) {
      if (!absl::IsDeadlineExceeded(message.status())) return message.status();
      return absl::UnavailableError(absl::StrCat(channel_->peer(), " fell silent"));
    }
    if (absl::Status s = Handle(*message); !s.ok()) return s;
    if (over_) break;
    if (absl::Status s = CheckMemory(); !s.ok()) return s;
    if (absl::Status s = links_->Check(); !s.ok()) return s;
  }
  return absl::OkStatus();
}

// Memory that can't be read is no copy of anything: the source begins anew, with new memory.
absl::Status TargetConversation::CheckMemory() {
  absl::Status status = slot_->place->memory().Check();
  if (!status.ok()) forget_ = true;
  return status;
}

absl::Status TargetConversation::Handle(const Body& message) {
  switch (message.body_case()) {
    case Body::kPing: {
      if (!loaded_) {
        if (absl::Status s = slot_->place->Check(); !s.ok()) return s;
        if (absl::Status s = LookAtCopy(); !s.ok()) return s;
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
      AbortHandover(/*source_has_it=*/true);
      return absl::OkStatus();
    case Body::kLaunchExpected:
      service_->NoteLaunchExpected(slot_, message.launch_expected());
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

void TargetConversation::End(const absl::Status& why) {
  if (slot_ == nullptr) {
    if (!why.ok()) {
      service_->LogRefusal(*channel_, why);
      Send(MakeRefused(why)).IgnoreError();
    }
    return;
  }
  if (!why.ok()) {
    if (links_ == nullptr) {
      service_->LogRefusal(*channel_, why);  // it comes back every second
    } else {
      service_->Log(true, absl::StrCat(slot_->guest, ": ", why.message()));
    }
    Send(MakeRefused(why)).IgnoreError();
  }
  FinishHashing();
  links_.reset();
  // Whatever ended the conversation, an order to run can't come any more: the guest never runs
  // here.
  if (!over_ && guest_ != nullptr) AbortHandover(/*source_has_it=*/!loaded_);
  if (record_ && !record_->used()) record_->Remove().IgnoreError();
  service_->ReleaseSlot(slot_, forget_);
}

void RunTargetConversation(TargetService* service, ControlChannel* channel) {
  TargetConversation(service, channel).Run();
}

}  // namespace presync
