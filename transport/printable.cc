#include "transport/printable.h"

#include <algorithm>
#include <cstdint>
#include <iterator>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"

namespace presync {
namespace {

struct Character {
  uint32_t code = 0;
  size_t bytes = 0;  // 0: no UTF-8 begins here
};

// RFC 3629: no overlong forms, no surrogates, nothing beyond U+10FFFF.
Character Decode(absl::string_view text) {
  const auto byte = [&](size_t i) { return static_cast<uint8_t>(text[i]); };
  const uint8_t first = byte(0);
  if (first < 0x80) return {first, 1};
  const size_t bytes = first >= 0xf0 ? 4 : first >= 0xe0 ? 3 : 2;
  if (first < 0xc2 || first > 0xf4 || text.size() < bytes) return {};
  uint32_t code = first & (0xff >> (bytes + 1));
  for (size_t i = 1; i < bytes; ++i) {
    if ((byte(i) & 0xc0) != 0x80) return {};
    code = code << 6 | (byte(i) & 0x3f);
  }
  const bool overlong = (bytes == 3 && code < 0x800) || (bytes == 4 && code < 0x10000);
  const bool surrogate = code >= 0xd800 && code < 0xe000;
  return overlong || surrogate || code > 0x10ffff ? Character{} : Character{code, bytes};
}

bool IsHarmless(uint32_t code) {
  struct Range {
    uint32_t first, last;
  };
  static constexpr Range kHarmful[] = {
      {0x00, 0x1f},      {0x7f, 0x9f},      // control characters: C0, DEL, C1
      {0xad, 0xad},      {0x61c, 0x61c},    // soft hyphen, Arabic letter mark
      {0x180e, 0x180e},  {0x200b, 0x200f},  // without width, left-to-right and right-to-left marks
      {0x2028, 0x202e},  {0x2060, 0x206f},  // separators of lines, embeddings, isolates
      {0xfeff, 0xfeff},  {0xfff9, 0xfffb},  // byte order mark, annotations
      {0xe0000, 0xe007f}};                  // tags
  return std::none_of(std::begin(kHarmful), std::end(kHarmful), [code](const Range& range) {
    return code >= range.first && code <= range.last;
  });
}

std::string Escaped(uint32_t code) {
  switch (code) {
    case '\n':
      return "\\n";
    case '\r':
      return "\\r";
    case '\t':
      return "\\t";
    default:
      return code < 0x80 ? absl::StrFormat("\\x%02x", code) : absl::StrFormat("\\u%04x", code);
  }
}

}  // namespace

std::string PrintableText(absl::string_view text, size_t most_bytes) {
  std::string clean;
  while (!text.empty()) {
    const Character next = Decode(text);
    const std::string piece = next.bytes == 0
                                  ? absl::StrFormat("\\x%02x", static_cast<uint8_t>(text[0]))
                              : IsHarmless(next.code) ? std::string(text.substr(0, next.bytes))
                                                      : Escaped(next.code);
    if (clean.size() + piece.size() > most_bytes) return clean + "...";
    clean += piece;
    text.remove_prefix(std::max<size_t>(next.bytes, 1));
  }
  return clean;
}

}  // namespace presync
