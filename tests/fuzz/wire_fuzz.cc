// Fixed formats of the wire: preambles, frames of the TCP link, messages of the RDMA link, the
// words that a peer's text may hold. What is taken must come out again as it went in.
#include <cstring>

#include "tests/fuzz/fuzz_input.h"
#include "transport/printable.h"
#include "transport/rdma/message.h"
#include "transport/sync/conversation.h"
#include "transport/sync/link_messages.h"
#include "transport/sync/session_id.h"
#include "transport/tcp/frame.h"
#include "transport/wire/preamble.h"

namespace presync {
namespace {

absl::Span<const uint8_t> Bytes(std::string_view text) {
  return {reinterpret_cast<const uint8_t*>(text.data()), text.size()};
}
absl::Span<const std::byte> RawBytes(std::string_view text) {
  return {reinterpret_cast<const std::byte*>(text.data()), text.size()};
}

void TryPreamble(std::string_view text) {
  const absl::StatusOr<Preamble> preamble = DecodePreamble(Bytes(text));
  if (!preamble.ok()) return;
  const auto again = EncodePreamble(*preamble);
  FUZZ_REQUIRE(std::memcmp(again.data(), text.data(), again.size()) == 0);
}

void TryFrame(std::string_view text) {
  const absl::StatusOr<Frame> frame = DecodeFrame(RawBytes(text));
  if (!frame.ok()) return;
  std::byte again[kFrameHeaderBytes];
  EncodeFrame(*frame, again);
  FUZZ_REQUIRE(std::memcmp(again, text.data(), sizeof(again)) == 0);
}

void TryRdmaMessage(std::string_view text) {
  const absl::StatusOr<RdmaMessage> message = DecodeMessage(RawBytes(text));
  if (!message.ok()) return;
  std::byte again[kMaxMessageBytes];
  const size_t bytes = EncodeMessage(*message, again);
  FUZZ_REQUIRE(bytes == text.size() && std::memcmp(again, text.data(), bytes) == 0);
}

void TryConnectData(std::string_view text) {
  const absl::StatusOr<ConnectData> data = DecodeConnectData(Bytes(text));
  if (!data.ok()) return;
  const auto again = EncodeConnectData(*data);
  FUZZ_REQUIRE(std::memcmp(again.data(), text.data(), again.size()) == 0);
}

void TryOffer(std::string_view text) {
  wire::LinkOffer offer;
  if (!offer.ParseFromArray(text.data(), static_cast<int>(text.size()))) return;
  const absl::StatusOr<RdmaOffer> taken = OfferFromWire(offer);
  if (!taken.ok()) return;
  const wire::ControlMessage again = MakeOffer(offer.link(), *taken);
  FUZZ_REQUIRE(OfferFromWire(again.link_offer()).ok());
}

void TryText(std::string_view text) {
  const std::string clean = PrintableText({text.data(), text.size()});
  for (const unsigned char c : clean) FUZZ_REQUIRE(c >= 0x20 && c != 0x7f);
  wire::Refused refused;
  if (!refused.ParseFromArray(text.data(), static_cast<int>(text.size()))) return;
  FUZZ_REQUIRE(!RefusedStatus(refused, "the peer").ok());
}

void TryId(std::string_view text) {
  const absl::StatusOr<SessionId> id = IdFromHex({text.data(), text.size()});
  if (id.ok()) FUZZ_REQUIRE(IdFromHex(IdToHex(*id)).value() == *id);
}

}  // namespace
}  // namespace presync

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  presync::fuzz::FuzzInput input(data, size);
  constexpr void (*kTries[])(std::string_view) = {
      presync::TryPreamble, presync::TryFrame, presync::TryRdmaMessage, presync::TryConnectData,
      presync::TryOffer,    presync::TryText,  presync::TryId};
  const size_t which = input.Byte() % std::size(kTries);
  kTries[which](input.rest());
  return 0;
}
