// Connections that came in and have not said yet who they are: how many of them there may be, and
// which one has to go when there are more. Whoever crowds goes before whoever does not, and the
// oldest goes before the newest: a legitimate peer has said who it is after some milliseconds,
// while somebody silent would have to come anew all the time to keep others out.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <string>

namespace presync {

// Where an address is, as far as one attacker's reach goes. A place is an IPv4 address, or the /64
// of an IPv6 address, within which everybody has as many addresses as he likes; a network is the
// /24, or the /48. Of what is no address both are the text itself.
struct Whereabouts {
  std::string place;
  std::string network;
};
Whereabouts WhereaboutsOf(const std::string& address);

struct NewcomerLimits {
  uint32_t all = 128;
  uint32_t a_place = 32;
  uint32_t known_places = 1024;  // that are remembered
};

// Not thread-safe. Looks at `all` newcomers for each that enters.
class Newcomers {
 public:
  using Id = uint64_t;

  explicit Newcomers(const NewcomerLimits& limits) : limits_(limits) {}

  // The newcomer that has to go so that one from `address` may enter; none: there is room. Of a
  // place that has all it may, that place's oldest; else, where all there may be are in, the one
  // that MakeRoom gives.
  std::optional<Id> RoomFor(const std::string& address) const;
  // The oldest of the most crowded place of the most crowded network; of places that are known only
  // if nobody else is in. None: nobody is in.
  std::optional<Id> MakeRoom() const;

  // `id` must be greater than any before.
  void Enter(Id id, const std::string& address);
  // It has said who it is, or is gone. Ok too if it is not in.
  void Leave(Id id);

  // Somebody from there has shown a certificate that is believed here: strangers won't displace
  // those who come from that place later. Of more than known_places the one that was seen least
  // lately is forgotten.
  void Know(const std::string& address);
  bool Knows(const std::string& address) const;

 private:
  const NewcomerLimits limits_;
  std::map<Id, Whereabouts> in_;
  std::map<std::string, uint64_t> known_;  // by place: when it was seen, in calls of Know
  uint64_t seen_ = 0;
};

}  // namespace presync
