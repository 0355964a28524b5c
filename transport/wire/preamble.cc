#include "transport/wire/preamble.h"

#include <algorithm>
#include <cstring>

namespace presync {
namespace {

constexpr char kMagic[] = "PRESYNC1";
constexpr uint32_t kMaxStreams = 1024;

void StoreLittle32(uint32_t value, uint8_t* out) {
  for (int i = 0; i < 4; ++i) out[i] = static_cast<uint8_t>(value >> (8 * i));
}

uint32_t LoadLittle32(const uint8_t* in) {
  return in[0] | in[1] << 8 | in[2] << 16 | static_cast<uint32_t>(in[3]) << 24;
}

}  // namespace

std::array<uint8_t, kPreambleBytes> EncodePreamble(const Preamble& preamble) {
  std::array<uint8_t, kPreambleBytes> bytes = {};
  std::memcpy(bytes.data(), kMagic, 8);
  StoreLittle32(static_cast<uint32_t>(preamble.kind), &bytes[8]);
  StoreLittle32(preamble.stream, &bytes[12]);
  std::copy(preamble.token.begin(), preamble.token.end(), &bytes[16]);
  return bytes;
}

absl::StatusOr<Preamble> DecodePreamble(absl::Span<const uint8_t> bytes) {
  if (bytes.size() < kPreambleBytes || std::memcmp(bytes.data(), kMagic, 8) != 0) {
    return absl::InvalidArgumentError("the peer does not speak presync's protocol");
  }
  const uint32_t kind = LoadLittle32(&bytes[8]);
  Preamble preamble;
  preamble.stream = LoadLittle32(&bytes[12]);
  std::copy(&bytes[16], &bytes[16] + 16, preamble.token.begin());
  if (kind == 1 && preamble.stream == 0) {
    preamble.kind = Preamble::Kind::kControl;
  } else if (kind == 2 && preamble.stream < kMaxStreams) {
    preamble.kind = Preamble::Kind::kData;
  } else {
    return absl::InvalidArgumentError("the peer opened a connection of an unknown kind");
  }
  return preamble;
}

}  // namespace presync
