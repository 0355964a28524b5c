#include "qemu-glue/dirty_log/guest_process.h"

#include <fcntl.h>
#include <unistd.h>

#include <cerrno>
#include <vector>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "predictor/page.h"
#include "qemu-glue/dirty_log/guest_maps.h"
#include "qemu-glue/plugin/kernel_abi.h"

namespace presync {
namespace {

// The process's number in its innermost pid namespace: the last field of NSpid in /proc/PID/status.
pid_t InnermostPid(const std::string& status) {
  for (const auto line : absl::StrSplit(status, '\n')) {
    if (line.substr(0, 6) != "NSpid:") continue;
    const std::vector<std::string> fields =
        absl::StrSplit(line, absl::ByAnyChar("\t "), absl::SkipEmpty());
    int pid = 0;
    if (absl::SimpleAtoi(fields.back(), &pid)) return pid;
  }
  return 0;
}

}  // namespace

absl::StatusOr<GuestProcess> GuestProcess::Open(GlueClient* client, absl::Time deadline) {
  GuestProcess process;
  process.pid_ = client->pid();
  const std::string folder = absl::StrCat("/proc/", process.pid_);

  absl::StatusOr<std::string> maps = ReadProcFile(folder + "/maps");
  if (!maps.ok()) return maps.status();
  process.maps_ = *std::move(maps);
  const absl::StatusOr<std::string> status = ReadProcFile(folder + "/status");
  if (!status.ok()) return status.status();
  process.pagemap_.reset(::open((folder + "/pagemap").c_str(), O_RDONLY | O_CLOEXEC));
  if (!process.pagemap_.valid()) return ProcFileError(errno, folder + "/pagemap");

  // An answer now means that the process lived all the while, so its number was its own when the
  // files were opened.
  const absl::Status alive = client->Ping(deadline);
  if (!alive.ok()) return alive;
  if (InnermostPid(*status) != client->pid_within()) {
    return absl::FailedPreconditionError(
        absl::StrCat("process ", process.pid_, " is not the one that answers at the glue socket"));
  }
  return process;
}

absl::StatusOr<GuestProcess> GuestProcess::Duplicate() const {
  GuestProcess copy;
  copy.pid_ = pid_;
  copy.maps_ = maps_;
  copy.pagemap_.reset(::fcntl(pagemap_.get(), F_DUPFD_CLOEXEC, 0));
  if (!copy.pagemap_.valid()) return absl::ErrnoToStatus(errno, "duplicating a descriptor");
  return copy;
}

absl::Status GuestProcess::CheckAlive(uint64_t address) const {
  return IsProtected(address).status();
}

absl::StatusOr<bool> GuestProcess::IsProtected(uint64_t address) const {
  uint64_t entry = 0;
  const auto offset = static_cast<off_t>(address / kPageBytes * sizeof(entry));
  ssize_t bytes;
  do {
    bytes = ::pread(pagemap_.get(), &entry, sizeof(entry), offset);
  } while (bytes < 0 && errno == EINTR);
  // 0 bytes: the memory this file refers to has no user any more.
  if (bytes != sizeof(entry)) {
    return absl::UnavailableError(absl::StrCat("QEMU's process ", pid_, " has ended"));
  }
  return (entry & PRESYNC_PAGEMAP_UFFD_WP) != 0;
}

}  // namespace presync
