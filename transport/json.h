// Parsing JSON that someone else wrote.
#pragma once

#include <nlohmann/json.hpp>
#include <string_view>

namespace presync {

// Deeper than anything that QEMU, presyncd or presync have to say.
inline constexpr int kMaxJsonDepth = 64;

// Whether `text`, read as JSON, has arrays and objects nested deeper than `most`. Looks at every
// byte once.
inline bool NestsDeeperThan(std::string_view text, int most) {
  int depth = 0;
  bool in_string = false;
  for (size_t i = 0; i < text.size(); ++i) {
    const char c = text[i];
    if (in_string) {
      if (c == '\\') ++i;
      in_string = c != '"';
    } else if (c == '"') {
      in_string = true;
    } else if (c == '[' || c == '{') {
      if (++depth > most) return true;
    } else if (c == ']' || c == '}') {
      --depth;
    }
  }
  return false;
}

// Discarded (see is_discarded) if it is no JSON, or nested deeper than kMaxJsonDepth: the library
// copies and prints values by recursion, so that depth is stack.
inline nlohmann::json ParseJson(std::string_view text) {
  if (NestsDeeperThan(text, kMaxJsonDepth)) {
    return nlohmann::json(nlohmann::json::value_t::discarded);
  }
  return nlohmann::json::parse(text.begin(), text.end(), nullptr, /*allow_exceptions=*/false);
}

}  // namespace presync
