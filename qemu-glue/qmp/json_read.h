// Reading JSON that someone else wrote: nothing here throws, whatever the types turn out to be.
#pragma once

#include <cstdint>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>

namespace presync {

using Json = nlohmann::json;

// The member `key` of `value`, or nullptr if `value` is no object or has none. Points into `value`.
inline const Json* FindMember(const Json& value, const char* key) {
  if (!value.is_object()) return nullptr;
  auto it = value.find(key);
  return it == value.end() ? nullptr : &*it;
}

// The string at `key`; empty if there is none or it is something else.
inline std::string StringAt(const Json& value, const char* key) {
  const Json* member = FindMember(value, key);
  return member != nullptr && member->is_string() ? *member->get_ptr<const std::string*>()
                                                  : std::string();
}

// The non-negative integer at `key`.
inline std::optional<uint64_t> UintAt(const Json& value, const char* key) {
  const Json* member = FindMember(value, key);
  if (member == nullptr || !member->is_number_unsigned()) return std::nullopt;
  return *member->get_ptr<const uint64_t*>();
}

// The boolean at `key`.
inline std::optional<bool> BoolAt(const Json& value, const char* key) {
  const Json* member = FindMember(value, key);
  if (member == nullptr || !member->is_boolean()) return std::nullopt;
  return *member->get_ptr<const bool*>();
}

// One line of text for logs and for the wire; bytes that are not UTF-8 become U+FFFD.
inline std::string ToText(const Json& value) {
  return value.dump(-1, ' ', true, Json::error_handler_t::replace);
}

}  // namespace presync
