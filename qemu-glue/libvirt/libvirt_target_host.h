// The target's side for guests that libvirt manages. presync keeps their memory in files beside
// those that libvirt's own guests have; when libvirt starts a domain whose memory is here, its hook
// asks for that file and puts it (a hard link) where QEMU will look for its RAM.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "qemu-glue/libvirt/libvirt_client.h"
#include "transport/mutex.h"
#include "transport/sync/target_host.h"
#include "transport/unique_fd.h"

namespace presync {

struct LibvirtHostOptions {
  std::string uri = "qemu:///system";
  std::string memory_backing_dir;  // as in qemu.conf, on a tmpfs
  std::string socket_folder;       // presync's and QEMU's, and nobody else's
  uint64_t max_guest_bytes = 0;    // 0: what the host has
};

// How a file of mirrored memory becomes a domain's: `path` is linked under the name `region` into
// the domain's folder below LibvirtTargetHost::domains_folder(). Others may change what the path
// means; the device and the inode say which file it must be.
struct MirroredFile {
  std::string region;
  std::string path;
  uint64_t device = 0;
  uint64_t inode = 0;
};

struct LibvirtArrival;  // one domain whose memory is mirrored here

// Thread-safe.
class LibvirtTargetHost {
 public:
  // Makes the folder for memory (0700, below memory_backing_dir) and takes away what an earlier
  // presyncd left in it: no session has it any more. UNAVAILABLE: it can't; FAILED_PRECONDITION:
  // memory_backing_dir is on no tmpfs; ALREADY_EXISTS: another presyncd uses it.
  static absl::StatusOr<std::unique_ptr<LibvirtTargetHost>> Create(LibvirtHostOptions options);

  // See TargetHost::MakeDomainPlace.
  absl::StatusOr<std::unique_ptr<TargetPlace>> MakePlace(const std::string& guest,
                                                         const std::string& uuid,
                                                         const std::vector<RegionRequest>& regions)
      ABSL_LOCKS_EXCLUDED(mutex_);

  // What libvirt's hook tells, in the order in which libvirt calls it. NOT_FOUND, of all of them:
  // this domain is none of presync's, now.

  // libvirt is asked to receive this domain. Returns the guest's name in its session.
  absl::StatusOr<std::string> OnMigrate(const std::string& uuid) ABSL_LOCKS_EXCLUDED(mutex_);
  // libvirt is about to start its QEMU. NOT_FOUND also for a start that no OnMigrate came before:
  // it is a new guest's, with memory of its own.
  absl::StatusOr<std::vector<MirroredFile>> OnStart(const std::string& uuid)
      ABSL_LOCKS_EXCLUDED(mutex_);
  // Its QEMU runs and waits. FAILED_PRECONDITION: it does not fit the guest.
  absl::Status OnStarted(const std::string& uuid) ABSL_LOCKS_EXCLUDED(mutex_);
  // Its QEMU has ended. Returns the guest's name.
  absl::StatusOr<std::string> OnEnded(const std::string& uuid) ABSL_LOCKS_EXCLUDED(mutex_);

  // For recovery: addresses that places of this host have had. See RecoveryHost.
  static bool IsAddress(const std::string& address);
  absl::Status EndOrphan(const std::string& address);
  absl::Status RunOrphan(const std::string& address);

  const LibvirtHostOptions& options() const { return options_; }
  // Where libvirt makes a folder with the memory of each domain, NUMBER-NAME.
  std::string domains_folder() const { return options_.memory_backing_dir + "/libvirt/qemu"; }

 private:
  LibvirtTargetHost(LibvirtHostOptions options, UniqueFd lock);
  absl::StatusOr<std::shared_ptr<LibvirtArrival>> Find(const std::string& uuid)
      ABSL_LOCKS_EXCLUDED(mutex_);
  absl::Status CheckRoom(const std::string& guest, const std::string& uuid,
                         const std::vector<RegionRequest>& regions) const;

  const LibvirtHostOptions options_;
  const UniqueFd lock_;  // on the folder with the memory
  const LibvirtClient libvirt_;
  Mutex mutex_;
  std::map<std::string, std::weak_ptr<LibvirtArrival>> arrivals_ ABSL_GUARDED_BY(mutex_);
};

// `memory_backing_dir` of libvirt's qemu.conf, or libvirt's default for it.
std::string ReadMemoryBackingDir(const std::string& qemu_conf = "/etc/libvirt/qemu.conf");

// Whether `path` is on a tmpfs (or hugetlbfs); if not, what to do.
absl::Status CheckMemoryFolder(const std::string& path);

}  // namespace presync
