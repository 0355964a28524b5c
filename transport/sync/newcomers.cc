#include "transport/sync/newcomers.h"

#include <arpa/inet.h>

#include <algorithm>
#include <cstddef>
#include <tuple>
#include <utility>

namespace presync {
namespace {

constexpr size_t kIpv4Offset = 12;  // in ::ffff:a.b.c.d

std::string Prefix(const in6_addr& address, size_t bytes, const char* suffix) {
  in6_addr prefix = {};
  std::copy_n(address.s6_addr, bytes, prefix.s6_addr);
  char text[INET6_ADDRSTRLEN] = {};
  ::inet_ntop(AF_INET6, &prefix, text, sizeof(text));
  return std::string(text) + suffix;
}

Whereabouts OfIpv4(const uint8_t* bytes) {
  char text[INET_ADDRSTRLEN] = {};
  ::inet_ntop(AF_INET, bytes, text, sizeof(text));
  const std::string place = text;
  return {place, place.substr(0, place.rfind('.')) + ".0/24"};
}

}  // namespace

Whereabouts WhereaboutsOf(const std::string& address) {
  const std::string bare = address.substr(0, address.find('%'));
  in_addr v4 = {};
  if (::inet_pton(AF_INET, bare.c_str(), &v4) == 1) {
    return OfIpv4(reinterpret_cast<const uint8_t*>(&v4));
  }
  in6_addr v6 = {};
  if (::inet_pton(AF_INET6, bare.c_str(), &v6) != 1) return {address, address};
  if (IN6_IS_ADDR_V4MAPPED(&v6)) return OfIpv4(v6.s6_addr + kIpv4Offset);
  return {Prefix(v6, 8, "/64"), Prefix(v6, 6, "/48")};
}

std::optional<Newcomers::Id> Newcomers::RoomFor(const std::string& address) const {
  const std::string place = WhereaboutsOf(address).place;
  const auto is_there = [&](const auto& entry) { return entry.second.place == place; };
  if (static_cast<size_t>(std::count_if(in_.begin(), in_.end(), is_there)) >= limits_.a_place) {
    return std::find_if(in_.begin(), in_.end(), is_there)->first;  // ids grow: the oldest
  }
  if (in_.size() >= limits_.all) return MakeRoom();
  return std::nullopt;
}

std::optional<Newcomers::Id> Newcomers::MakeRoom() const {
  std::map<std::string, uint32_t> networks, places;
  for (const auto& [id, where] : in_) {
    ++networks[where.network];
    ++places[where.place];
  }
  // Strangers first, then the most crowded network, then the most crowded place in it.
  const auto rank = [&](const Whereabouts& where) {
    return std::tuple(known_.count(where.place) == 0, networks[where.network], places[where.place]);
  };
  const auto worst = std::max_element(in_.begin(), in_.end(), [&](const auto& a, const auto& b) {
    return rank(a.second) < rank(b.second);  // the first of equals: the oldest
  });
  if (worst == in_.end()) return std::nullopt;
  return worst->first;
}

void Newcomers::Enter(Id id, const std::string& address) { in_[id] = WhereaboutsOf(address); }

void Newcomers::Leave(Id id) { in_.erase(id); }

void Newcomers::Know(const std::string& address) {
  known_[WhereaboutsOf(address).place] = ++seen_;
  if (known_.size() <= limits_.known_places) return;
  known_.erase(std::min_element(known_.begin(), known_.end(),
                                [](const auto& a, const auto& b) { return a.second < b.second; }));
}

bool Newcomers::Knows(const std::string& address) const {
  return known_.count(WhereaboutsOf(address).place) != 0;
}

}  // namespace presync
