#include "qemu-glue/qemu_target_place.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <filesystem>
#include <optional>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "predictor/bitmap.h"
#include "qemu-glue/copy_note.h"
#include "qemu-glue/discovery.h"
#include "qemu-glue/guest_notes.h"
#include "qemu-glue/guest_shape.h"
#include "qemu-glue/mapped_file.h"
#include "qemu-glue/process_identity.h"
#include "qemu-glue/qemu_guest.h"
#include "qemu-glue/qemu_process.h"
#include "qemu-glue/qemu_target_host.h"
#include "qemu-glue/qemu_user.h"
#include "qemu-glue/qmp/qmp_client.h"
#include "qemu-glue/target_files.h"
#include "transport/clock.h"
#include "transport/mutex.h"

namespace presync {
namespace {

// A QEMU answers its monitor within a second; a loaded machine under emulation takes some.
constexpr absl::Duration kQmpTimeout = absl::Seconds(10);
constexpr absl::Duration kEndAfterFailure = absl::Seconds(1);

std::vector<RamBackend> ToBackends(const std::vector<RegionRequest>& regions) {
  std::vector<RamBackend> backends;
  for (const RegionRequest& region : regions) {
    backends.push_back({.id = region.name, .size_bytes = region.size_bytes, .shared = true});
  }
  return backends;
}

absl::Status FirstProblems(const Findings& findings) {
  if (findings.problems.empty()) return absl::OkStatus();
  std::vector<std::string> texts;
  for (const Problem& problem : findings.problems) {
    texts.push_back(absl::StrCat(problem.what, " (", problem.remedy, ")"));
  }
  return absl::FailedPreconditionError(absl::StrJoin(texts, "; "));
}

// Connects to a waiting QEMU and makes sure that it fits what the source described.
absl::StatusOr<std::unique_ptr<QemuTargetGuest>> AttachTo(std::unique_ptr<QmpClient> qmp,
                                                          const std::vector<RegionRequest>& regions,
                                                          GuestInfo* info, absl::Time deadline) {
  absl::StatusOr<GuestInfo> described = DescribeGuest(*qmp, deadline);
  if (!described.ok()) return described.status();
  absl::StatusOr<Findings> findings = CheckTarget(*qmp, *described, ToBackends(regions), deadline);
  if (!findings.ok()) return findings.status();
  if (absl::Status s = FirstProblems(*findings); !s.ok()) return s;
  *info = *std::move(described);
  return QemuTargetGuest::Create(std::move(qmp), deadline);
}

// Whether `guest`, if there is one, still waits; UNAVAILABLE with `otherwise` if not.
absl::Status CheckWaits(QemuTargetGuest* guest, absl::string_view otherwise) {
  if (guest == nullptr) return absl::OkStatus();
  const absl::StatusOr<RunState> state = guest->State(MonotonicNow() + kQmpTimeout);
  if (state.ok() && *state == RunState::kIncoming) return absl::OkStatus();
  return absl::UnavailableError(otherwise);
}

// A QEMU that does not answer says nothing about what it is.
ShapeComparison CompareWith(QemuTargetGuest* guest, const GuestShape& source, absl::Time deadline) {
  if (guest == nullptr) return {};
  const absl::StatusOr<GuestShape> here = DescribeShape(guest->qmp(), deadline);
  return here.ok() ? CompareShapes(source, *here) : ShapeComparison();
}

std::string ProcessOf(const QemuTargetGuest* guest) {
  return guest == nullptr ? "" : FormatProcess(guest->identity());
}

// A place whose QEMU somebody else started: its memory files are QEMU's own.
class AttachedPlace final : public TargetPlace {
 public:
  AttachedPlace(std::string qmp_path, std::unique_ptr<QemuTargetGuest> guest, GuestMemory memory,
                bool was_zero)
      : qmp_path_(std::move(qmp_path)),
        guest_(std::move(guest)),
        memory_(std::move(memory)),
        was_zero_(was_zero) {}

  const GuestMemory& memory() const override { return memory_; }
  bool memory_was_zero() const override { return was_zero_; }

  absl::StatusOr<TargetGuest*> Waiting(absl::Time) override {
    if (guest_ == nullptr) {
      return absl::FailedPreconditionError(
          absl::StrCat("the QEMU at ", qmp_path_,
                       " has ended, by itself or when a handover was called off; start "
                       "another there, with -incoming defer -S, and begin anew"));
    }
    return guest_.get();
  }

  absl::Status Check() override {
    return CheckWaits(guest_.get(), absl::StrCat("the waiting QEMU at ", qmp_path_,
                                                 " has ended or was used otherwise"));
  }

  ShapeComparison Compare(const GuestShape& source, absl::Time deadline) override {
    return CompareWith(guest_.get(), source, deadline);
  }

  absl::Status EndWaiting() override {
    if (guest_ == nullptr) return absl::OkStatus();
    const absl::Status ended = guest_->Discard(MonotonicNow() + kQmpTimeout);
    if (ended.ok()) guest_.reset();
    return ended;
  }

  // The QEMU is its operator's: a sync that ends before any handover leaves it waiting.
  void Keep() override {}
  std::string address() const override { return qmp_path_; }
  std::string process() const override { return ProcessOf(guest_.get()); }

 private:
  const std::string qmp_path_;
  std::unique_ptr<QemuTargetGuest> guest_;
  GuestMemory memory_;
  const bool was_zero_;
};

// A place made here: memory files and process are ours until Keep.
class StartedPlace final : public TargetPlace {
 public:
  StartedPlace(QemuTargetHost* host, std::string guest_name, std::vector<std::string> command,
               GuestPaths paths, std::vector<RegionRequest> regions, GuestMemory memory, bool fresh)
      : host_(host),
        guest_name_(std::move(guest_name)),
        command_(std::move(command)),
        paths_(std::move(paths)),
        regions_(std::move(regions)),
        memory_(std::move(memory)),
        fresh_(fresh) {}

  ~StartedPlace() override {
    if (kept_) return;
    EndWaiting().IgnoreError();
    RemoveFile(paths_.copy).IgnoreError();
    for (const std::string& path : paths_.ram) RemoveFile(path).IgnoreError();
    RemoveTraces(paths_);
  }

  const GuestMemory& memory() const override { return memory_; }
  bool memory_was_zero() const override { return fresh_; }

  absl::StatusOr<TargetGuest*> Waiting(absl::Time deadline) override {
    if (guest_ != nullptr && Check().ok()) return guest_.get();
    if (absl::Status s = EndWaiting(); !s.ok()) return s;
    absl::StatusOr<std::optional<ProcessUser>> user = host_->UserOf(guest_name_);
    if (!user.ok()) return user.status();
    user_ = *std::move(user);
    if (absl::Status s = PrepareFor(user_); !s.ok()) return s;
    // The note comes first: were this presyncd killed while QEMU starts, nobody would know of it.
    absl::Status noted;
    absl::StatusOr<QemuProcess> process = QemuProcess::Start(
        {.argv = command_,
         .qmp_path = paths_.qmp,
         .log_path = paths_.log,
         .user = user_,
         .on_started = [&](pid_t pid,
                           uint64_t start_ticks) { noted = WriteNote(pid, start_ticks); }},
        deadline);
    if (!process.ok()) {
      // It would have the memory files taken for leftovers.
      if (absl::Status s = RemoveFile(paths_.note); !s.ok()) return s;
      return process.status();
    }
    process_.emplace(*std::move(process));
    if (!noted.ok()) {  // a later presyncd would not know of it
      EndWaiting().IgnoreError();
      return noted;
    }
    GuestInfo info;
    absl::StatusOr<std::unique_ptr<QemuTargetGuest>> guest =
        AttachTo(process_->TakeMonitor(), regions_, &info, deadline);
    if (guest.ok()) {
      if (absl::Status s = CheckFiles((*guest)->peer()); !s.ok()) guest = s;
    }
    // This QEMU has no other use: what can be done before a launch is done now.
    if (guest.ok()) {
      if (absl::Status s = (*guest)->PrepareLoad(deadline); !s.ok()) guest = s;
    }
    if (!guest.ok()) {
      EndWaiting().IgnoreError();
      return absl::Status(guest.status().code(),
                          absl::StrCat("the QEMU that this host's configuration starts for ",
                                       guest_name_, ": ", guest.status().message()));
    }
    guest_ = *std::move(guest);
    return guest_.get();
  }

  absl::Status Check() override {
    return CheckWaits(guest_.get(), absl::StrCat("the QEMU waiting for ", guest_name_,
                                                 " has ended; see ", paths_.log));
  }

  ShapeComparison Compare(const GuestShape& source, absl::Time deadline) override {
    return CompareWith(guest_.get(), source, deadline);
  }

  std::string LastWords() override {
    // One that could not load a state is about to end, and writes why before it does.
    if (!process_ || !process_->AwaitEnd(MonotonicNow() + kEndAfterFailure)) return "";
    return process_->LastWords();
  }

  // Killed, for it has nothing to lose: a QEMU that ends in order may empty its memory
  // (discard-data=on), which is the copy.
  absl::Status EndWaiting() override {
    if (!process_) return absl::OkStatus();
    unknown_ |= process_->HasEnded();
    const absl::Status killed = process_->Kill(MonotonicNow() + kQmpTimeout);
    if (!killed.ok()) return killed;
    guest_.reset();
    process_.reset();
    // The note speaks of a process that is gone, and would have the memory files taken for
    // leftovers.
    return RemoveFile(paths_.note);
  }

  bool TakeUnknown() override { return std::exchange(unknown_, false); }

  absl::Status NoteCopy(const CopyOwner& owner) override {
    MutexLock lock(&note_mutex_);
    const absl::Status written = WriteCopyNote(paths_.copy, owner, FilesOf(memory_));
    if (!written.ok()) RemoveFile(paths_.copy).IgnoreError();
    return written;
  }

  absl::Status ForgetCopy() override {
    MutexLock lock(&note_mutex_);
    return RemoveFile(paths_.copy);
  }

  void Leave() override {
    // A QEMU that does not end is ended by the next presyncd, before it looks at the copy.
    if (EndWaiting().ok()) RemoveTraces(paths_);
    kept_ = true;
  }

  void Keep() override {
    kept_ = true;
    host_->Adopt(*std::move(process_));
    process_.reset();
  }

  std::string address() const override { return paths_.qmp; }
  std::string process() const override { return ProcessOf(guest_.get()); }

 private:
  // For a presyncd that comes after this one: whose files these are.
  absl::Status WriteNote(pid_t pid, uint64_t start_ticks) const {
    GuestNote note = {.guest = guest_name_,
                      .pid = pid,
                      .start_ticks = start_ticks,
                      .uid = user_ ? user_->uid : ::geteuid(),
                      .qmp = paths_.qmp,
                      .regions = {}};
    for (const RegionRequest& region : regions_) note.regions.push_back(region.name);
    return WriteGuestNote(host_->run_folder(), note);
  }

  // What the QEMU may touch: its memory, and a folder for its sockets. They stay presyncd's and
  // become its group's.
  absl::Status PrepareFor(const std::optional<ProcessUser>& user) {
    RemoveTraces(paths_);
    if (::mkdir(paths_.folder.c_str(), 0700) != 0) return FolderError("make");
    for (const auto& [link, socket] :
         {std::pair(paths_.qmp_before, paths_.qmp), std::pair(paths_.glue_before, paths_.glue)}) {
      const std::filesystem::path at(socket);
      const std::string to = at.parent_path().filename() / at.filename();
      if (::symlink(to.c_str(), link.c_str()) != 0) return FolderError("make a link to");
    }
    const gid_t group = user ? user->gid : ::getegid();
    const UniqueFd folder(
        ::open(paths_.folder.c_str(), O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC));
    if (user && (::fchown(folder.get(), static_cast<uid_t>(-1), group) != 0 ||
                 ::fchmod(folder.get(), 0770) != 0)) {
      return FolderError("hand over");
    }
    for (const Region& region : memory_.regions()) {
      struct stat st = {};
      if (::fstat(region.fd(), &st) != 0) return MemoryError(region);
      const mode_t mode = user ? 0660 : 0600;
      const bool as_it_should = st.st_gid == group && (st.st_mode & 07777) == mode;
      if (as_it_should || (!user && (st.st_mode & 0077) == 0)) continue;
      if (::fchown(region.fd(), static_cast<uid_t>(-1), group) != 0 ||
          ::fchmod(region.fd(), mode) != 0) {
        return MemoryError(region);
      }
    }
    return absl::OkStatus();
  }

  absl::Status FolderError(absl::string_view what) const {
    return absl::ErrnoToStatus(errno, absl::StrCat("start QEMU: ", what, " ", paths_.folder));
  }
  static absl::Status MemoryError(const Region& region) {
    return absl::ErrnoToStatus(errno, absl::StrCat("start QEMU: hand over ", region.path()));
  }

  // The QEMU must have mapped the very files that are mirrored into.
  absl::Status CheckFiles(const PeerProcess& process) const {
    for (const Region& region : memory_.regions()) {
      const absl::Status mapped =
          CheckMapped(process, region.name(), region.fd(), region.size_bytes());
      if (!mapped.ok() && !absl::IsFailedPrecondition(mapped)) return mapped;
      if (!mapped.ok()) {
        return absl::FailedPreconditionError(
            absl::StrCat("its memory backend ", region.name(),
                         " is not the file that is mirrored into; it must "
                         "have mem-path={ram.",
                         region.name(), "} in the command: ", mapped.message()));
      }
    }
    return absl::OkStatus();
  }

  QemuTargetHost* const host_;
  const std::string guest_name_;
  const std::vector<std::string> command_;
  const GuestPaths paths_;
  const std::vector<RegionRequest> regions_;
  GuestMemory memory_;
  const bool fresh_;
  Mutex note_mutex_;                 // one note at a time is written
  std::optional<ProcessUser> user_;  // of the QEMU; none: presyncd's own
  std::optional<QemuProcess> process_;
  std::unique_ptr<QemuTargetGuest> guest_;
  bool unknown_ = false;  // see TakeUnknown
  bool kept_ = false;
};

}  // namespace

void RemoveTraces(const GuestPaths& paths) {
  std::error_code error;  // remove_all follows no link
  std::filesystem::remove_all(paths.folder, error);
  for (const std::string& path : {paths.qmp_before, paths.glue_before, paths.note}) {
    RemoveFile(path).IgnoreError();
  }
}

absl::StatusOr<GuestMemory> CreateMemory(const std::vector<RegionRequest>& regions,
                                         const GuestPaths& paths) {
  std::vector<Region> made;
  absl::Status failure;
  for (size_t i = 0; i < regions.size() && failure.ok(); ++i) {
    absl::StatusOr<Region> region =
        Region::Create(regions[i].name, paths.ram[i], regions[i].size_bytes);
    if (region.ok()) {
      made.push_back(*std::move(region));
    } else {
      failure = region.status();
    }
  }
  if (!failure.ok()) {
    for (const Region& region : made) RemoveFile(region.path()).IgnoreError();
    return failure;
  }
  return GuestMemory::Create(std::move(made));
}

absl::StatusOr<GuestMemory> ReopenMemory(const std::vector<RegionRequest>& regions,
                                         const GuestPaths& paths) {
  std::vector<Region> opened;
  for (size_t i = 0; i < regions.size(); ++i) {
    absl::StatusOr<Region> region =
        Region::Open(regions[i].name, paths.ram[i], regions[i].size_bytes);
    if (!region.ok()) return region.status();
    opened.push_back(*std::move(region));
  }
  return GuestMemory::Create(std::move(opened));
}

std::unique_ptr<TargetPlace> MakeStartedPlace(QemuTargetHost* host, std::string guest,
                                              std::vector<std::string> command, GuestPaths paths,
                                              std::vector<RegionRequest> regions,
                                              GuestMemory memory, bool fresh) {
  return std::make_unique<StartedPlace>(host, std::move(guest), std::move(command),
                                        std::move(paths), std::move(regions), std::move(memory),
                                        fresh);
}

absl::StatusOr<std::unique_ptr<TargetPlace>> MakeAttachedPlace(
    const std::string& qmp_path, const std::vector<RegionRequest>& regions) {
  const absl::Time deadline = MonotonicNow() + kQmpTimeout;
  absl::StatusOr<std::unique_ptr<QmpClient>> qmp = QmpClient::Connect(qmp_path, deadline);
  if (!qmp.ok()) return qmp.status();
  GuestInfo info;
  absl::StatusOr<std::unique_ptr<QemuTargetGuest>> guest =
      AttachTo(*std::move(qmp), regions, &info, deadline);
  if (!guest.ok()) return guest.status();
  std::vector<Region> opened;
  for (const RegionRequest& wanted : regions) {
    const auto it = std::find_if(info.backends.begin(), info.backends.end(),
                                 [&](const RamBackend& b) { return b.id == wanted.name; });
    if (it == info.backends.end()) {
      return absl::FailedPreconditionError(
          absl::StrCat("the QEMU at ", qmp_path, " has no memory backend ", wanted.name));
    }
    absl::StatusOr<Region> region =
        OpenMappedRegion((*guest)->peer(), wanted.name, it->path, wanted.size_bytes);
    if (!region.ok()) return region.status();
    opened.push_back(*std::move(region));
  }
  absl::StatusOr<GuestMemory> memory = GuestMemory::Create(std::move(opened));
  if (!memory.ok()) return memory.status();
  absl::StatusOr<std::vector<PageRun>> holes = memory->Holes({0, memory->pages()});
  const bool zero = holes.ok() && CountPages(*holes) == memory->pages();
  return std::make_unique<AttachedPlace>(qmp_path, *std::move(guest), *std::move(memory), zero);
}

}  // namespace presync
