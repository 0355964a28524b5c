// What presync asks of libvirt. Every call opens a connection of its own: a libvirtd that was
// restarted, or is not there, is noticed by the call that needs it and by no other.
#pragma once

#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "qemu-glue/qmp/qmp_client.h"

namespace presync {

// A domain as libvirt on this host knows it.
struct DomainInfo {
  std::string name;
  std::string uuid;
  bool active = false;
  bool persistent = false;
  std::string xml;       // of the guest that runs, if it is active; else as it will be started
  std::string next_xml;  // as it will be started next; empty for a domain that is not persistent
};

enum class DomainState {
  kGone,      // not active on this host, or not known to it
  kRunning,   // blocked and idle ones too
  kArriving,  // paused by libvirt because it waits for, or receives, a migration
  kPaused,    // for any other reason
  kOther,     // shutting down, crashed, suspended by its own power management
};

// What libvirt is busy with.
enum class DomainJob {
  kNone,
  kArriving,  // the domain is migrated to this host
  kLeaving,   // from this host
  kOther,     // a save, a snapshot, its start, ...
};

// How libvirt is to move a domain.
struct DomainMove {
  std::string peer_uri;      // the target's libvirt
  std::string stream_uri;    // where the device state goes: "unix:///..."
  bool peer_to_peer = true;  // the source's libvirtd talks to the target's; else presyncd to both
  bool unsafe = false;       // although libvirt does not believe that the disks are shared safely
};

// Thread-safe. Calls block as long as libvirt does. Errors: UNIMPLEMENTED: presync was built
// without libvirt. UNAVAILABLE: no libvirtd answers. NOT_FOUND: no such domain. PERMISSION_DENIED.
// Else FAILED_PRECONDITION with libvirt's own words.
class LibvirtClient {
 public:
  // `uri` as virsh takes it: "qemu:///system".
  explicit LibvirtClient(std::string uri) : uri_(std::move(uri)) {}

  const std::string& uri() const { return uri_; }

  // libvirt's version, for people: "9.0.0".
  absl::StatusOr<std::string> Version() const;
  // That of the QEMU that it starts.
  absl::StatusOr<QmpVersion> Qemu() const;

  // By name or UUID.
  absl::StatusOr<DomainInfo> Find(const std::string& name_or_uuid) const;

  // Changes (or adds) a domain's definition; a guest that runs is not touched.
  absl::Status Define(const std::string& xml) const;

  // Whether libvirt starts the domain by itself when its host comes up.
  absl::StatusOr<bool> StartsByItself(const std::string& uuid) const;

  absl::StatusOr<DomainState> State(const std::string& uuid) const;
  absl::StatusOr<DomainJob> Job(const std::string& uuid) const;

  // Moves a running domain; returns when that is done or was undone. A domain that is persistent
  // here becomes persistent there, and is not defined here any more.
  absl::Status Move(const std::string& uuid, const DomainMove& move) const;
  // Ends what libvirt is busy with: domjobabort. Ok if it is not busy.
  absl::Status AbortJob(const std::string& uuid) const;

  absl::Status Resume(const std::string& uuid) const;
  // Ends the guest at once, as pulling the plug does. Ok if it is not active.
  absl::Status Destroy(const std::string& uuid) const;

 private:
  const std::string uri_;
};

}  // namespace presync
