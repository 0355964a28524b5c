// What a libvirt domain needs in its XML to be kept in sync, and where its sockets are.
#pragma once

#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "qemu-glue/discovery.h"

namespace presync {

// Sockets of one domain. The same paths on every host, for the XML travels with the domain.
struct DomainSockets {
  std::string qmp;     // a monitor of presync's own
  std::string glue;    // the plug-in's
  std::string stream;  // the device state: presyncd listens on the source, QEMU on the target
};
// Named libvirt-UUID, as the domain's profile of AppArmor's is: so a rule for all domains can let
// each have its own only.
DomainSockets SocketsOf(const std::string& folder, const std::string& uuid);
// Named UUID, as domains have them whose XML is of before 2026-12: any of libvirt's QEMUs may use
// them.
DomainSockets OldSocketsOf(const std::string& folder, const std::string& uuid);
// Those that this domain's XML names; SocketsOf if it names none.
DomainSockets SocketsIn(const std::string& xml, const std::string& folder, const std::string& uuid);

// Name, UUID and (of an active one) number, in a domain's XML. INVALID_ARGUMENT: it is none.
struct DomainNames {
  std::string name;
  std::string uuid;
  std::string id;  // empty: not active
};
absl::StatusOr<DomainNames> NamesIn(const std::string& xml);

// What keeps a domain with this XML from being kept in sync, each with its remedy; none: nothing.
// Looks at the XML only; a running guest is also looked at through its monitor (discovery.h).
absl::StatusOr<std::vector<Problem>> CheckDomain(const std::string& xml,
                                                 const DomainSockets& sockets);

// The XML with all that CheckDomain asks for; what was there before of presync's is replaced.
// FAILED_PRECONDITION: a setting that presync can't do with and won't take away (huge pages), with
// the reason.
absl::StatusOr<std::string> AddPresync(const std::string& xml, const DomainSockets& sockets,
                                       const std::string& plugin);

// The same as a person would add it by hand: the elements only.
std::string PresyncElements(const DomainSockets& sockets, const std::string& plugin);

}  // namespace presync
