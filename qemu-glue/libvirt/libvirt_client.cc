#include "qemu-glue/libvirt/libvirt_client.h"

#include <libvirt/libvirt.h>
#include <libvirt/virterror.h>

#include <cstdlib>
#include <memory>
#include <mutex>

#include "absl/strings/str_cat.h"
#include "transport/printable.h"

namespace presync {
namespace {

struct CloseConnection {
  void operator()(virConnectPtr connection) const { virConnectClose(connection); }
};
struct FreeDomain {
  void operator()(virDomainPtr domain) const { virDomainFree(domain); }
};
using Connection = std::unique_ptr<virConnect, CloseConnection>;
using Domain = std::unique_ptr<virDomain, FreeDomain>;

// libvirt's newest error in this thread.
absl::Status LastError(absl::string_view operation) {
  const virErrorPtr error = virGetLastError();
  const std::string text =
      absl::StrCat(operation, ": libvirt: ",
                   PrintableText(error == nullptr || error->message == nullptr ? "no reason given"
                                                                               : error->message));
  if (error == nullptr) return absl::FailedPreconditionError(text);
  switch (error->code) {
    case VIR_ERR_NO_DOMAIN:
      return absl::NotFoundError(text);
    case VIR_ERR_NO_CONNECT:
    case VIR_ERR_SYSTEM_ERROR:
    case VIR_ERR_RPC:
      return absl::UnavailableError(text);
    case VIR_ERR_AUTH_FAILED:
    case VIR_ERR_AUTH_CANCELLED:
    case VIR_ERR_AUTH_UNAVAILABLE:
    case VIR_ERR_ACCESS_DENIED:
      return absl::PermissionDeniedError(text);
    default:
      return absl::FailedPreconditionError(text);
  }
}

absl::StatusOr<Connection> Connect(const std::string& uri) {
  static std::once_flag once;
  std::call_once(once, [] {
    virInitialize();
    virSetErrorFunc(nullptr, [](void*, virErrorPtr) {});  // else it prints to stderr
  });
  Connection connection(virConnectOpen(uri.c_str()));
  if (connection == nullptr) return LastError(absl::StrCat("connect to ", uri));
  return connection;
}

// A domain and the connection that it is of.
struct Handle {
  Connection connection;
  Domain domain;
  virDomainPtr get() const { return domain.get(); }
};

absl::StatusOr<Handle> Open(const std::string& uri, const std::string& name_or_uuid) {
  absl::StatusOr<Connection> connection = Connect(uri);
  if (!connection.ok()) return connection.status();
  Domain domain(virDomainLookupByUUIDString(connection->get(), name_or_uuid.c_str()));
  if (domain == nullptr) {
    domain.reset(virDomainLookupByName(connection->get(), name_or_uuid.c_str()));
  }
  if (domain == nullptr) return LastError(absl::StrCat("find the domain ", name_or_uuid));
  return Handle{*std::move(connection), std::move(domain)};
}

absl::StatusOr<std::string> Xml(virDomainPtr domain, unsigned int flags) {
  char* text = virDomainGetXMLDesc(domain, flags);
  if (text == nullptr) return LastError("read the domain's XML");
  std::string xml(text);
  std::free(text);  // NOLINT: allocated by malloc
  return xml;
}

}  // namespace

absl::StatusOr<std::string> LibvirtClient::Version() const {
  absl::StatusOr<Connection> connection = Connect(uri_);
  if (!connection.ok()) return connection.status();
  unsigned long number = 0;  // NOLINT: libvirt's type
  if (virConnectGetLibVersion(connection->get(), &number) != 0) return LastError("ask its version");
  return absl::StrCat(number / 1000000, ".", number / 1000 % 1000, ".", number % 1000);
}

absl::StatusOr<QmpVersion> LibvirtClient::Qemu() const {
  absl::StatusOr<Connection> connection = Connect(uri_);
  if (!connection.ok()) return connection.status();
  unsigned long number = 0;  // NOLINT: libvirt's type
  if (virConnectGetVersion(connection->get(), &number) != 0) return LastError("ask QEMU's version");
  return QmpVersion{number / 1000000, number / 1000 % 1000, number % 1000};
}

absl::StatusOr<DomainInfo> LibvirtClient::Find(const std::string& name_or_uuid) const {
  absl::StatusOr<Handle> domain = Open(uri_, name_or_uuid);
  if (!domain.ok()) return domain.status();
  DomainInfo info;
  char uuid[VIR_UUID_STRING_BUFLEN] = {};
  if (virDomainGetUUIDString(domain->get(), uuid) != 0) return LastError("read a domain's UUID");
  info.uuid = uuid;
  info.name = virDomainGetName(domain->get());
  info.active = virDomainIsActive(domain->get()) == 1;
  info.persistent = virDomainIsPersistent(domain->get()) == 1;
  absl::StatusOr<std::string> xml = Xml(domain->get(), VIR_DOMAIN_XML_SECURE);
  if (!xml.ok()) return xml.status();
  info.xml = *std::move(xml);
  if (info.persistent) {
    xml = Xml(domain->get(), VIR_DOMAIN_XML_SECURE | VIR_DOMAIN_XML_INACTIVE);
    if (!xml.ok()) return xml.status();
    info.next_xml = *std::move(xml);
  }
  return info;
}

absl::Status LibvirtClient::Define(const std::string& xml) const {
  absl::StatusOr<Connection> connection = Connect(uri_);
  if (!connection.ok()) return connection.status();
  const Domain domain(
      virDomainDefineXMLFlags(connection->get(), xml.c_str(), VIR_DOMAIN_DEFINE_VALIDATE));
  return domain == nullptr ? LastError("define the domain") : absl::OkStatus();
}

absl::StatusOr<DomainState> LibvirtClient::State(const std::string& uuid) const {
  absl::StatusOr<Handle> domain = Open(uri_, uuid);
  if (absl::IsNotFound(domain.status())) return DomainState::kGone;
  if (!domain.ok()) return domain.status();
  int state = 0;
  int reason = 0;
  if (virDomainGetState(domain->get(), &state, &reason, 0) != 0) {
    const absl::Status error = LastError(absl::StrCat("ask the state of the domain ", uuid));
    if (absl::IsNotFound(error)) return DomainState::kGone;
    return error;
  }
  switch (state) {
    case VIR_DOMAIN_RUNNING:
    case VIR_DOMAIN_BLOCKED:
      return DomainState::kRunning;
    case VIR_DOMAIN_PAUSED:
      return reason == VIR_DOMAIN_PAUSED_MIGRATION || reason == VIR_DOMAIN_PAUSED_STARTING_UP
                 ? DomainState::kArriving
                 : DomainState::kPaused;
    case VIR_DOMAIN_SHUTOFF:
      return DomainState::kGone;
    default:
      return DomainState::kOther;
  }
}

absl::StatusOr<DomainJob> LibvirtClient::Job(const std::string& uuid) const {
  absl::StatusOr<Handle> domain = Open(uri_, uuid);
  if (!domain.ok()) return domain.status();
  int type = VIR_DOMAIN_JOB_NONE;
  virTypedParameterPtr parameters = nullptr;
  int count = 0;
  if (virDomainGetJobStats(domain->get(), &type, &parameters, &count, 0) != 0) {
    const virErrorPtr error = virGetLastError();
    // What its driver for QEMU says of a migration that comes, and of nothing else (as of 9.0.0).
    if (error != nullptr && error->code == VIR_ERR_OPERATION_INVALID &&
        virDomainIsActive(domain->get()) == 1) {
      return DomainJob::kArriving;
    }
    return LastError(absl::StrCat("ask what libvirt does with the domain ", uuid));
  }
  int operation = VIR_DOMAIN_JOB_OPERATION_UNKNOWN;
  virTypedParamsGetInt(parameters, count, VIR_DOMAIN_JOB_OPERATION, &operation);
  virTypedParamsFree(parameters, count);
  if (type != VIR_DOMAIN_JOB_BOUNDED && type != VIR_DOMAIN_JOB_UNBOUNDED) return DomainJob::kNone;
  switch (operation) {
    case VIR_DOMAIN_JOB_OPERATION_MIGRATION_IN:
      return DomainJob::kArriving;
    case VIR_DOMAIN_JOB_OPERATION_MIGRATION_OUT:
      return DomainJob::kLeaving;
    default:
      return DomainJob::kOther;
  }
}

absl::Status LibvirtClient::Move(const std::string& uuid, const DomainMove& move) const {
  absl::StatusOr<Handle> domain = Open(uri_, uuid);
  if (!domain.ok()) return domain.status();
  unsigned int flags = VIR_MIGRATE_LIVE;
  if (move.unsafe) flags |= VIR_MIGRATE_UNSAFE;
  if (virDomainIsPersistent(domain->get()) == 1) {
    flags |= VIR_MIGRATE_PERSIST_DEST | VIR_MIGRATE_UNDEFINE_SOURCE;
  }
  virTypedParameterPtr parameters = nullptr;
  int count = 0;
  int capacity = 0;
  if (virTypedParamsAddString(&parameters, &count, &capacity, VIR_MIGRATE_PARAM_URI,
                              move.stream_uri.c_str()) != 0) {
    return LastError("prepare a migration");
  }
  const auto unsigned_count = static_cast<unsigned int>(count);
  absl::Status moved;
  if (move.peer_to_peer) {
    if (virDomainMigrateToURI3(domain->get(), move.peer_uri.c_str(), parameters, unsigned_count,
                               flags | VIR_MIGRATE_PEER2PEER) != 0) {
      moved = LastError(absl::StrCat("migrate to ", move.peer_uri));
    }
  } else {
    absl::StatusOr<Connection> peer = Connect(move.peer_uri);
    if (peer.ok()) {
      const Domain there(
          virDomainMigrate3(domain->get(), peer->get(), parameters, unsigned_count, flags));
      if (there == nullptr) moved = LastError(absl::StrCat("migrate to ", move.peer_uri));
    } else {
      moved = peer.status();
    }
  }
  virTypedParamsFree(parameters, count);
  return moved;
}

absl::Status LibvirtClient::AbortJob(const std::string& uuid) const {
  absl::StatusOr<Handle> domain = Open(uri_, uuid);
  if (!domain.ok()) return domain.status();
  if (virDomainAbortJob(domain->get()) == 0) return absl::OkStatus();
  const virErrorPtr error = virGetLastError();
  if (error != nullptr && error->code == VIR_ERR_OPERATION_INVALID) return absl::OkStatus();
  return LastError(absl::StrCat("end what libvirt does with the domain ", uuid));
}

absl::StatusOr<bool> LibvirtClient::StartsByItself(const std::string& uuid) const {
  absl::StatusOr<Handle> domain = Open(uri_, uuid);
  if (!domain.ok()) return domain.status();
  int on = 0;
  if (virDomainGetAutostart(domain->get(), &on) == 0) return on != 0;
  // One without a definition can't be started again at all.
  return absl::StatusOr<bool>(false);
}

absl::Status LibvirtClient::Resume(const std::string& uuid) const {
  absl::StatusOr<Handle> domain = Open(uri_, uuid);
  if (!domain.ok()) return domain.status();
  return virDomainResume(domain->get()) == 0 ? absl::OkStatus()
                                             : LastError(absl::StrCat("resume the domain ", uuid));
}

absl::Status LibvirtClient::Destroy(const std::string& uuid) const {
  absl::StatusOr<Handle> domain = Open(uri_, uuid);
  if (absl::IsNotFound(domain.status())) return absl::OkStatus();
  if (!domain.ok()) return domain.status();
  if (virDomainIsActive(domain->get()) == 0 || virDomainDestroy(domain->get()) == 0) {
    return absl::OkStatus();
  }
  return LastError(absl::StrCat("destroy the domain ", uuid));
}

}  // namespace presync
