// Which peers may keep guests in sync with this host, and how much of it they may take.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "transport/memory.h"

namespace presync {

// Of one peer, or of all together. 0: no limit.
struct PeerRules {
  uint32_t max_guests = 0;          // mirrored here at a time, lost sessions that are kept included
  uint64_t max_memory_bytes = 0;    // of these guests
  std::vector<std::string> guests;  // names that may come; "web-*" is every name that begins so;
                                    // none given: all that this host has configured
  std::vector<std::string> folders;  // where their memory's files may lie; none given: anywhere
};

// By the name in the peer's certificate. Without a map every certificate of the authority's may.
using PeerList = std::optional<std::map<std::string, PeerRules>>;

// What is mirrored here already, of one peer or of all.
struct PeerUse {
  uint32_t guests = 0;
  uint64_t memory_bytes = 0;
};

// The rules for `peer`. Null: it is not on the list.
const PeerRules* FindRules(const PeerList& list, const std::string& peer);

// Ok: a guest of `bytes` more is within the rules; `whose` names them in the texts.
// PERMISSION_DENIED: not this guest. RESOURCE_EXHAUSTED: no room for it any more.
absl::Status CheckRules(const PeerRules& rules, const PeerUse& use, const std::string& guest,
                        uint64_t bytes, const std::string& whose);

// PERMISSION_DENIED: a file of `memory` lies elsewhere. Looks at where the open files are now, with
// all symbolic links resolved, not at the paths they were opened by.
absl::Status CheckFolders(const PeerRules& rules, const GuestMemory& memory);

}  // namespace presync
