#include "qemu-glue/libvirt/libvirt_target_host.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/magic.h>
#include <sys/stat.h>
#include <sys/vfs.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/strip.h"
#include "qemu-glue/discovery.h"
#include "qemu-glue/libvirt/domain_xml.h"
#include "qemu-glue/libvirt/libvirt_target_guest.h"
#include "qemu-glue/mapped_file.h"
#include "qemu-glue/qmp/qmp_client.h"
#include "qemu-glue/target_files.h"
#include "transport/clock.h"

namespace presync {

// Shared by the place, the hook's calls and whoever loads the guest. The lock is held while QEMU is
// looked at for the first time.
struct LibvirtArrival {
  std::string guest;
  std::string uuid;
  std::vector<RamBackend> backends;
  std::vector<MirroredFile> files;
  Mutex mutex;
  bool coming ABSL_GUARDED_BY(mutex) = false;  // between libvirt's `migrate` and its end of QEMU
  std::shared_ptr<LibvirtTargetGuest> waiting ABSL_GUARDED_BY(mutex);
};

namespace {

constexpr absl::Duration kQmpTimeout = absl::Seconds(10);
constexpr absl::string_view kScheme = "libvirt:";

std::string MarkerOf(const LibvirtHostOptions& options, const std::string& uuid) {
  return absl::StrCat(options.socket_folder, "/", uuid, ".mirrored");
}

std::string MemoryFolder(const LibvirtHostOptions& options) {
  return options.memory_backing_dir + "/presync";
}

// What a QEMU that libvirt ended leaves: no domain of this UUID is active here.
void RemoveSockets(const LibvirtHostOptions& options, const std::string& uuid) {
  for (const auto& of : {SocketsOf, OldSocketsOf}) {
    const DomainSockets sockets = of(options.socket_folder, uuid);
    for (const std::string& path : {sockets.qmp, sockets.glue, sockets.stream}) {
      RemoveFile(path).IgnoreError();
    }
  }
}

// Those that the domain's QEMU, which waits, has made. Which ones only its XML says, and libvirt is
// busy with the domain.
DomainSockets SocketsMade(const LibvirtHostOptions& options, const std::string& uuid) {
  struct stat there = {};
  const DomainSockets sockets = SocketsOf(options.socket_folder, uuid);
  const DomainSockets old = OldSocketsOf(options.socket_folder, uuid);
  const bool is_old =
      ::lstat(sockets.qmp.c_str(), &there) != 0 && ::lstat(old.qmp.c_str(), &there) == 0;
  return is_old ? old : sockets;
}

absl::Status WriteMarker(const std::string& path) {
  const UniqueFd fd(::open(path.c_str(), O_CREAT | O_WRONLY | O_CLOEXEC | O_NOFOLLOW, 0644));
  if (fd.valid() && ::fchmod(fd.get(), 0644) == 0) return absl::OkStatus();
  return absl::UnavailableError(absl::StrCat("write ", path, ": ", std::strerror(errno)));
}

// The place's side of a guest that does not wait yet: libvirt starts its QEMU only when it comes to
// a launch.
class ArrivingGuest final : public TargetGuest {
 public:
  explicit ArrivingGuest(std::shared_ptr<LibvirtArrival> arrival) : arrival_(std::move(arrival)) {}

  void OnReturn(ReturnBytes on_return) override { on_return_ = std::move(on_return); }

  absl::StatusOr<UniqueFd> BeginLoad(absl::Time deadline) override {
    {
      MutexLock lock(&arrival_->mutex);
      if (!arrival_->coming || arrival_->waiting == nullptr) return NoneWaits();
      loading_ = arrival_->waiting;
    }
    loading_->OnReturn(on_return_);
    return loading_->BeginLoad(deadline);
  }
  absl::Status AwaitLoaded(absl::Time deadline) override {
    return loading_ == nullptr ? NoneWaits() : loading_->AwaitLoaded(deadline);
  }
  bool HasRun() override { return loading_ != nullptr && loading_->HasRun(); }
  absl::Status Run(absl::Time deadline) override {
    return loading_ == nullptr ? NoneWaits() : loading_->Run(deadline);
  }
  // Also one that waits and was not begun to be loaded.
  absl::Status Discard(absl::Time deadline) override {
    std::shared_ptr<LibvirtTargetGuest> guest = std::move(loading_);
    {
      MutexLock lock(&arrival_->mutex);
      if (guest == nullptr && arrival_->coming) guest = arrival_->waiting;
      if (guest != nullptr) arrival_->coming = false;
      arrival_->waiting.reset();
    }
    return guest == nullptr ? absl::OkStatus() : guest->Discard(deadline);
  }
  absl::StatusOr<RunState> State(absl::Time deadline) override {
    if (loading_ == nullptr) return RunState::kIncoming;  // it will be
    return loading_->State(deadline);
  }

 private:
  absl::Status NoneWaits() const {
    return absl::FailedPreconditionError(
        absl::StrCat("libvirt here has started no QEMU for ", arrival_->guest,
                     " that presync knows of: is presync's hook in /etc/libvirt/hooks/qemu.d?"));
  }

  ReturnBytes on_return_ = [](absl::string_view) {};
  std::shared_ptr<LibvirtTargetGuest> loading_;  // from BeginLoad until Discard
  const std::shared_ptr<LibvirtArrival> arrival_;
};

class LibvirtPlace final : public TargetPlace {
 public:
  LibvirtPlace(std::shared_ptr<LibvirtArrival> arrival, GuestMemory memory, std::string marker)
      : arrival_(std::move(arrival)),
        memory_(std::move(memory)),
        marker_(std::move(marker)),
        guest_(arrival_) {}

  ~LibvirtPlace() override {
    if (!kept_) EndWaiting().IgnoreError();
    // The domain has a name of its own for the same file.
    RemoveFile(marker_).IgnoreError();
    for (const MirroredFile& file : arrival_->files) RemoveFile(file.path).IgnoreError();
  }

  const GuestMemory& memory() const override { return memory_; }
  bool memory_was_zero() const override { return true; }
  absl::StatusOr<TargetGuest*> Waiting(absl::Time) override { return &guest_; }
  // Before a launch there is nothing that could have ended, and in one its end is noticed.
  absl::Status Check() override { return absl::OkStatus(); }
  absl::Status EndWaiting() override { return guest_.Discard(MonotonicNow() + 2 * kQmpTimeout); }
  void Keep() override { kept_ = true; }
  std::string address() const override { return absl::StrCat(kScheme, arrival_->uuid); }
  // What becomes of a domain libvirt knows, by its UUID.
  std::string process() const override { return address(); }

 private:
  const std::shared_ptr<LibvirtArrival> arrival_;
  GuestMemory memory_;
  const std::string marker_;
  ArrivingGuest guest_;
  bool kept_ = false;
};

// QEMU must have mapped the very files that are mirrored into.
absl::Status CheckFiles(const PeerProcess& process, const std::vector<MirroredFile>& files) {
  for (const MirroredFile& file : files) {
    const UniqueFd ours(::open(file.path.c_str(), O_PATH | O_CLOEXEC | O_NOFOLLOW));
    struct stat made = {};
    if (!ours.valid() || ::fstat(ours.get(), &made) != 0) {
      return absl::UnavailableError(absl::StrCat("open ", file.path, ": ", std::strerror(errno)));
    }
    const absl::Status mapped =
        CheckMapped(process, file.region, ours.get(), static_cast<uint64_t>(made.st_size));
    if (!mapped.ok() && !absl::IsFailedPrecondition(mapped)) return mapped;
    if (!mapped.ok()) {
      return absl::FailedPreconditionError(absl::StrCat(
          "its memory ", file.region,
          " is not the file that is mirrored into: is memory_backing_dir in presyncd.toml that of "
          "libvirt's qemu.conf? (",
          mapped.message(), ")"));
    }
  }
  return absl::OkStatus();
}

absl::StatusOr<std::unique_ptr<LibvirtTargetGuest>> LookAtWaiting(
    const LibvirtArrival& arrival, const LibvirtHostOptions& options) {
  const absl::Time deadline = MonotonicNow() + kQmpTimeout;
  const DomainSockets sockets = SocketsMade(options, arrival.uuid);
  absl::StatusOr<std::unique_ptr<QmpClient>> qmp = QmpClient::Connect(sockets.qmp, deadline);
  if (!qmp.ok()) return qmp.status();
  absl::StatusOr<GuestInfo> info = DescribeGuest(**qmp, deadline);
  if (!info.ok()) return info.status();
  absl::StatusOr<Findings> findings = CheckTarget(**qmp, *info, arrival.backends, deadline);
  if (!findings.ok()) return findings.status();
  if (!findings->problems.empty()) {
    std::vector<std::string> texts;
    for (const Problem& problem : findings->problems) texts.push_back(problem.what);
    return absl::FailedPreconditionError(absl::StrJoin(texts, "; "));
  }
  absl::StatusOr<std::unique_ptr<LibvirtTargetGuest>> guest = LibvirtTargetGuest::Create(
      *std::move(qmp), options.uri, arrival.uuid, sockets.stream, deadline);
  if (!guest.ok()) return guest.status();
  if (absl::Status s = CheckFiles((*guest)->peer(), arrival.files); !s.ok()) return s;
  return guest;
}

std::string UuidIn(const std::string& address) {
  return std::string(absl::StripPrefix(address, kScheme));
}

}  // namespace

std::string ReadMemoryBackingDir(const std::string& qemu_conf) {
  std::ifstream in(qemu_conf);
  std::string line;
  std::string folder = "/var/lib/libvirt/qemu/ram";  // libvirt's default
  while (std::getline(in, line)) {
    absl::string_view rest = absl::StripAsciiWhitespace(line);
    if (!absl::ConsumePrefix(&rest, "memory_backing_dir")) continue;
    rest = absl::StripAsciiWhitespace(rest);
    if (!absl::ConsumePrefix(&rest, "=")) continue;
    rest = absl::StripAsciiWhitespace(rest);
    const size_t end = rest.size() > 1 ? rest.find(rest[0], 1) : absl::string_view::npos;
    if (end != absl::string_view::npos) folder = std::string(rest.substr(1, end - 1));
  }
  return folder;
}

absl::Status CheckMemoryFolder(const std::string& path) {
  struct statfs system = {};
  if (::statfs(path.c_str(), &system) != 0) {
    return absl::FailedPreconditionError(
        absl::StrCat("memory_backing_dir ", path, ": ", std::strerror(errno)));
  }
  if (system.f_type == TMPFS_MAGIC || system.f_type == HUGETLBFS_MAGIC) return absl::OkStatus();
  return absl::FailedPreconditionError(absl::StrCat(
      "memory_backing_dir ", path,
      " is on no tmpfs: set memory_backing_dir in /etc/libvirt/qemu.conf to a folder on one (for "
      "example /dev/shm/libvirt), restart libvirtd, and start the guests anew"));
}

LibvirtTargetHost::LibvirtTargetHost(LibvirtHostOptions options, UniqueFd lock)
    : options_(std::move(options)), lock_(std::move(lock)), libvirt_(options_.uri) {}

absl::StatusOr<std::unique_ptr<LibvirtTargetHost>> LibvirtTargetHost::Create(
    LibvirtHostOptions options) {
  std::error_code error;
  for (const std::string& folder : {options.socket_folder, options.memory_backing_dir}) {
    std::filesystem::create_directories(folder, error);
    if (!std::filesystem::is_directory(folder)) {
      return absl::UnavailableError(
          absl::StrCat("make the folder ", folder, ": ", error.message()));
    }
  }
  if (absl::Status s = CheckMemoryFolder(options.memory_backing_dir); !s.ok()) return s;
  const std::string memory = MemoryFolder(options);
  if (::mkdir(memory.c_str(), 0700) != 0 && errno != EEXIST) {
    return absl::UnavailableError(
        absl::StrCat("make the folder ", memory, ": ", std::strerror(errno)));
  }
  absl::StatusOr<UniqueFd> lock = LockFolder(memory, "memory_backing_dir");
  if (!lock.ok()) return lock.status();
  for (const auto& entry : std::filesystem::directory_iterator(memory, error)) {
    if (entry.path().extension() == ".ram") RemoveFile(entry.path()).IgnoreError();
  }
  for (const auto& entry : std::filesystem::directory_iterator(options.socket_folder, error)) {
    if (entry.path().extension() == ".mirrored") RemoveFile(entry.path()).IgnoreError();
  }
  return std::unique_ptr<LibvirtTargetHost>(
      new LibvirtTargetHost(std::move(options), *std::move(lock)));
}

absl::Status LibvirtTargetHost::CheckRoom(const std::string& guest, const std::string& uuid,
                                          const std::vector<RegionRequest>& regions) const {
  if (absl::Status s = CheckGuestSize(guest, regions, options_.max_guest_bytes); !s.ok()) return s;
  const absl::StatusOr<DomainState> state = libvirt_.State(uuid);
  if (!state.ok()) return state.status();
  if (*state != DomainState::kGone) {
    return absl::AlreadyExistsError(
        absl::StrCat("the domain ", guest, " (", uuid, ") is active on this host already"));
  }
  return absl::OkStatus();
}

absl::StatusOr<std::unique_ptr<TargetPlace>> LibvirtTargetHost::MakePlace(
    const std::string& guest, const std::string& uuid, const std::vector<RegionRequest>& regions) {
  if (absl::Status s = CheckRoom(guest, uuid, regions); !s.ok()) return s;
  RemoveSockets(options_, uuid);
  auto arrival = std::make_shared<LibvirtArrival>();
  arrival->guest = guest;
  arrival->uuid = uuid;
  std::vector<Region> made;
  absl::Status failure;
  for (const RegionRequest& region : regions) {
    arrival->backends.push_back(
        {.id = region.name, .size_bytes = region.size_bytes, .shared = true});
    const std::string path =
        absl::StrCat(MemoryFolder(options_), "/", uuid, ".", region.name, ".ram");
    absl::StatusOr<Region> file = Region::Create(region.name, path, region.size_bytes);
    if (!file.ok()) {
      failure = file.status();
      break;
    }
    struct stat itself = {};
    if (::fstat(file->fd(), &itself) != 0) itself = {};  // which no file is, so none is linked
    arrival->files.push_back({region.name, path, itself.st_dev, itself.st_ino});
    made.push_back(*std::move(file));
  }
  const std::string marker = MarkerOf(options_, uuid);
  absl::StatusOr<GuestMemory> memory =
      failure.ok() ? GuestMemory::Create(std::move(made)) : absl::StatusOr<GuestMemory>(failure);
  if (memory.ok()) failure = WriteMarker(marker);
  if (!memory.ok() || !failure.ok()) {
    for (const MirroredFile& file : arrival->files) RemoveFile(file.path).IgnoreError();
    return memory.ok() ? failure : memory.status();
  }
  {
    MutexLock lock(&mutex_);
    std::erase_if(arrivals_, [](const auto& entry) { return entry.second.expired(); });
    arrivals_[uuid] = arrival;
  }
  return std::make_unique<LibvirtPlace>(std::move(arrival), *std::move(memory), marker);
}

absl::StatusOr<std::shared_ptr<LibvirtArrival>> LibvirtTargetHost::Find(const std::string& uuid) {
  MutexLock lock(&mutex_);
  const auto it = arrivals_.find(uuid);
  std::shared_ptr<LibvirtArrival> arrival = it == arrivals_.end() ? nullptr : it->second.lock();
  if (arrival != nullptr) return arrival;
  return absl::NotFoundError(absl::StrCat("the memory of ", uuid, " is not mirrored here"));
}

absl::StatusOr<std::string> LibvirtTargetHost::OnMigrate(const std::string& uuid) {
  absl::StatusOr<std::shared_ptr<LibvirtArrival>> arrival = Find(uuid);
  if (!arrival.ok()) return arrival.status();
  MutexLock lock(&(*arrival)->mutex);
  (*arrival)->coming = true;
  return (*arrival)->guest;
}

absl::StatusOr<std::vector<MirroredFile>> LibvirtTargetHost::OnStart(const std::string& uuid) {
  absl::StatusOr<std::shared_ptr<LibvirtArrival>> arrival = Find(uuid);
  if (!arrival.ok()) return arrival.status();
  MutexLock lock(&(*arrival)->mutex);
  if ((*arrival)->coming) return (*arrival)->files;
  return absl::NotFoundError(absl::StrCat(uuid, " is started here, not migrated to here"));
}

absl::Status LibvirtTargetHost::OnStarted(const std::string& uuid) {
  absl::StatusOr<std::shared_ptr<LibvirtArrival>> arrival = Find(uuid);
  if (!arrival.ok()) return arrival.status();
  MutexLock lock(&(*arrival)->mutex);
  if (!(*arrival)->coming) return absl::NotFoundError(absl::StrCat(uuid, " is not expected"));
  absl::StatusOr<std::unique_ptr<LibvirtTargetGuest>> guest = LookAtWaiting(**arrival, options_);
  if (!guest.ok()) return guest.status();
  (*arrival)->waiting = *std::move(guest);
  return absl::OkStatus();
}

absl::StatusOr<std::string> LibvirtTargetHost::OnEnded(const std::string& uuid) {
  absl::StatusOr<std::shared_ptr<LibvirtArrival>> arrival = Find(uuid);
  if (!arrival.ok()) return arrival.status();
  MutexLock lock(&(*arrival)->mutex);
  if (!(*arrival)->coming) return absl::NotFoundError(absl::StrCat(uuid, " is not expected"));
  // A conversation that loads it may have it in hand: it notices by itself.
  (*arrival)->coming = false;
  return (*arrival)->guest;
}

bool LibvirtTargetHost::IsAddress(const std::string& address) {
  return absl::StartsWith(address, kScheme);
}

absl::Status LibvirtTargetHost::EndOrphan(const std::string& address) {
  const std::string uuid = UuidIn(address);
  const absl::StatusOr<DomainState> state = libvirt_.State(uuid);
  if (!state.ok()) return state.status();
  if (*state == DomainState::kGone) return absl::OkStatus();
  if (*state == DomainState::kArriving) {
    // A domain that leaves is paused for the same reason, and may be the only one there is.
    const absl::StatusOr<DomainJob> job = libvirt_.Job(uuid);
    if (!job.ok()) return job.status();
    if (*job == DomainJob::kArriving) return libvirt_.Destroy(uuid);
    if (*job != DomainJob::kNone) {
      return absl::UnavailableError(
          absl::StrCat("the domain ", uuid,
                       " is active here, and libvirt is busy with it: it leaves or begins"));
    }
  }
  // Running, or once run and paused by somebody: it may be the only one there is.
  return absl::FailedPreconditionError(
      absl::StrCat("the domain ", uuid,
                   " is active here, though presync did not let it run: look at it by virsh "
                   "domstate --reason ",
                   uuid, ", and if it is not the guest that counts: virsh destroy ", uuid));
}

// libvirt runs it by itself when it has all of its state, or else has ended it.
absl::Status LibvirtTargetHost::RunOrphan(const std::string& address) {
  const std::string uuid = UuidIn(address);
  const absl::StatusOr<DomainState> state = libvirt_.State(uuid);
  if (!state.ok()) return state.status();
  if (*state == DomainState::kRunning) return absl::OkStatus();
  if (*state == DomainState::kGone) {
    return absl::NotFoundError(absl::StrCat("the domain ", uuid, " is not active here any more"));
  }
  return absl::UnavailableError(
      absl::StrCat("the domain ", uuid, " is here, and libvirt has not run it yet"));
}

}  // namespace presync
