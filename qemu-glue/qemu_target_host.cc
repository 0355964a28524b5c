#include "qemu-glue/qemu_target_host.h"

#include <errno.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <filesystem>
#include <optional>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_replace.h"
#include "predictor/bitmap.h"
#include "qemu-glue/discovery.h"
#include "qemu-glue/guest_notes.h"
#include "qemu-glue/qemu_guest.h"
#include "qemu-glue/qmp/qmp_client.h"

namespace presync {
namespace {

// A QEMU answers its monitor within a second; a loaded machine under emulation takes some.
constexpr absl::Duration kQmpTimeout = absl::Seconds(10);

struct Paths {
  std::string qmp, glue, log, note;
  std::vector<std::string> ram;  // in the regions' order
};

Paths MakePaths(const QemuTargetHostOptions& options, const std::string& guest,
                const std::vector<RegionRequest>& regions) {
  const std::string base = absl::StrCat(options.run_folder, "/", guest);
  Paths paths = {.qmp = base + ".qmp",
                 .glue = base + ".glue",
                 .log = base + ".log",
                 .note = base + ".guest",
                 .ram = {}};
  for (const RegionRequest& region : regions) {
    paths.ram.push_back(absl::StrCat(options.ram_folder, "/", guest, ".", region.name, ".ram"));
  }
  return paths;
}

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

absl::Status RemoveFile(const std::string& path) {
  if (::unlink(path.c_str()) == 0 || errno == ENOENT) return absl::OkStatus();
  return absl::UnavailableError(absl::StrCat("remove ", path, ": ", std::strerror(errno)));
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
                       " was ended when an earlier handover was called off; start "
                       "another there, with -incoming defer -S, and begin anew"));
    }
    return guest_.get();
  }

  absl::Status Check() override {
    if (guest_ == nullptr) return absl::OkStatus();
    const absl::StatusOr<RunState> state = guest_->State(absl::Now() + kQmpTimeout);
    if (state.ok() && *state == RunState::kIncoming) return absl::OkStatus();
    return absl::UnavailableError(
        absl::StrCat("the waiting QEMU at ", qmp_path_, " has ended or was used otherwise"));
  }

  absl::Status EndWaiting() override {
    if (guest_ == nullptr) return absl::OkStatus();
    const absl::Status ended = guest_->Discard(absl::Now() + kQmpTimeout);
    if (ended.ok()) guest_.reset();
    return ended;
  }

  // The QEMU is its operator's: a sync that ends before any handover leaves it waiting.
  void Keep() override {}
  std::string address() const override { return qmp_path_; }

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
               Paths paths, std::vector<RegionRequest> regions, GuestMemory memory)
      : host_(host),
        guest_name_(std::move(guest_name)),
        command_(std::move(command)),
        paths_(std::move(paths)),
        regions_(std::move(regions)),
        memory_(std::move(memory)) {}

  ~StartedPlace() override {
    if (kept_) return;
    EndWaiting().IgnoreError();
    for (const std::string& path : paths_.ram) RemoveFile(path).IgnoreError();
    RemoveFile(paths_.qmp).IgnoreError();
    RemoveFile(paths_.glue).IgnoreError();
    RemoveFile(paths_.note).IgnoreError();
  }

  const GuestMemory& memory() const override { return memory_; }
  bool memory_was_zero() const override { return true; }

  absl::StatusOr<TargetGuest*> Waiting(absl::Time deadline) override {
    if (guest_ != nullptr && Check().ok()) return guest_.get();
    if (absl::Status s = EndWaiting(); !s.ok()) return s;
    absl::StatusOr<QemuProcess> process = QemuProcess::Start(
        {.argv = command_, .qmp_path = paths_.qmp, .log_path = paths_.log}, deadline);
    if (!process.ok()) return process.status();
    process_.emplace(*std::move(process));
    WriteNote();
    GuestInfo info;
    absl::StatusOr<std::unique_ptr<QemuTargetGuest>> guest =
        AttachTo(process_->TakeMonitor(), regions_, &info, deadline);
    if (guest.ok()) {
      if (absl::Status s = CheckFiles(info); !s.ok()) guest = s;
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
    if (guest_ == nullptr) return absl::OkStatus();
    const absl::StatusOr<RunState> state = guest_->State(absl::Now() + kQmpTimeout);
    if (state.ok() && *state == RunState::kIncoming) return absl::OkStatus();
    return absl::UnavailableError(
        absl::StrCat("the QEMU waiting for ", guest_name_, " has ended; see ", paths_.log));
  }

  absl::Status EndWaiting() override {
    if (guest_ != nullptr) guest_->Discard(absl::Now() + kQmpTimeout).IgnoreError();
    guest_.reset();
    if (!process_) return absl::OkStatus();
    const absl::Status killed = process_->Kill(absl::Now() + kQmpTimeout);
    if (!killed.ok()) return killed;
    process_.reset();
    // The note speaks of a process that is gone, and would have the memory files taken for
    // leftovers.
    return RemoveFile(paths_.note);
  }

  void Keep() override {
    kept_ = true;
    host_->Adopt(*std::move(process_));
    process_.reset();
  }

  std::string address() const override { return paths_.qmp; }

 private:
  // For a presyncd that comes after this one: whose files these are.
  void WriteNote() const {
    GuestNote note = {.path = paths_.note,
                      .pid = process_->pid(),
                      .start_ticks = process_->start_ticks(),
                      .qmp = paths_.qmp,
                      .files = {paths_.qmp, paths_.glue}};
    note.files.insert(note.files.end(), paths_.ram.begin(), paths_.ram.end());
    WriteGuestNote(note);
  }

  // The QEMU must have mapped the very files that are mirrored into: not just the same path, for a
  // file that is missing there QEMU makes anew.
  absl::Status CheckFiles(const GuestInfo& info) const {
    for (const Region& region : memory_.regions()) {
      const auto it = std::find_if(info.backends.begin(), info.backends.end(),
                                   [&](const RamBackend& b) { return b.id == region.name(); });
      struct stat ours = {}, theirs = {};
      if (it == info.backends.end() || ::fstat(region.fd(), &ours) != 0 ||
          ::stat(it->path.c_str(), &theirs) != 0 || ours.st_dev != theirs.st_dev ||
          ours.st_ino != theirs.st_ino) {
        return absl::FailedPreconditionError(
            absl::StrCat("its memory backend ", region.name(),
                         " is not the file that is mirrored into; it must "
                         "have mem-path={ram.",
                         region.name(), "} in the command"));
      }
    }
    return absl::OkStatus();
  }

  QemuTargetHost* const host_;
  const std::string guest_name_;
  const std::vector<std::string> command_;
  const Paths paths_;
  const std::vector<RegionRequest> regions_;
  GuestMemory memory_;
  std::optional<QemuProcess> process_;
  std::unique_ptr<QemuTargetGuest> guest_;
  bool kept_ = false;
};

absl::StatusOr<std::vector<std::string>> FillTemplate(const std::vector<std::string>& command,
                                                      const std::string& guest, const Paths& paths,
                                                      const std::vector<RegionRequest>& regions) {
  std::vector<std::pair<std::string, std::string>> values = {
      {"{qmp}", paths.qmp}, {"{glue}", paths.glue}, {"{name}", guest}};
  for (size_t i = 0; i < regions.size(); ++i) {
    values.emplace_back(absl::StrCat("{ram.", regions[i].name, "}"), paths.ram[i]);
  }
  std::vector<std::string> filled;
  for (const std::string& argument : command) {
    filled.push_back(absl::StrReplaceAll(argument, values));
    if (absl::StrContains(filled.back(), "{ram.")) {
      return absl::FailedPreconditionError(absl::StrCat("this host's command for ", guest,
                                                        " has a memory backend that the source "
                                                        "does not have: ",
                                                        argument));
    }
  }
  const auto has = [&](absl::string_view option) {
    return std::find(filled.begin(), filled.end(), option) != filled.end();
  };
  if (!has("-incoming")) filled.insert(filled.end(), {"-incoming", "defer"});
  if (!has("-S")) filled.push_back("-S");
  return filled;
}

absl::StatusOr<GuestMemory> CreateMemory(const std::vector<RegionRequest>& regions,
                                         const Paths& paths) {
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

absl::StatusOr<std::unique_ptr<TargetPlace>> MakeAttachedPlace(
    const std::string& qmp_path, const std::vector<RegionRequest>& regions) {
  const absl::Time deadline = absl::Now() + kQmpTimeout;
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
    absl::StatusOr<Region> region = Region::Open(wanted.name, it->path, wanted.size_bytes);
    if (!region.ok()) return region.status();
    opened.push_back(*std::move(region));
  }
  absl::StatusOr<GuestMemory> memory = GuestMemory::Create(std::move(opened));
  if (!memory.ok()) return memory.status();
  absl::StatusOr<std::vector<PageRun>> holes = memory->Holes({0, memory->pages()});
  const bool zero = holes.ok() && CountPages(*holes) == memory->pages();
  return std::make_unique<AttachedPlace>(qmp_path, *std::move(guest), *std::move(memory), zero);
}

// The QEMU that an earlier presyncd started and that answers at `qmp_path`: the very process of the
// note, never another one that was given its socket since. NOT_FOUND: it has ended.
absl::StatusOr<std::unique_ptr<QemuSourceGuest>> OpenOrphan(const std::string& folder,
                                                            const std::string& qmp_path,
                                                            absl::Time deadline) {
  for (const GuestNote& note : ReadGuestNotes(folder)) {
    if (note.qmp != qmp_path || !IsAlive(note)) continue;
    absl::StatusOr<std::unique_ptr<QmpClient>> qmp = QmpClient::Connect(qmp_path, deadline);
    if (!qmp.ok()) return qmp.status();
    if ((*qmp)->peer_pid() != note.pid) break;
    return QemuSourceGuest::Create(*std::move(qmp), deadline);
  }
  return absl::NotFoundError(absl::StrCat("the QEMU that was started at ", qmp_path, " has ended"));
}

// A folder that is there already keeps its rights: it may be everybody's /dev/shm.
absl::Status MakeFolder(const std::string& path) {
  std::error_code error;
  const bool made = std::filesystem::create_directories(path, error);
  if (!std::filesystem::is_directory(path)) {
    return absl::UnavailableError(absl::StrCat("make the folder ", path, ": ", error.message()));
  }
  if (made) ::chmod(path.c_str(), 0700);
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<std::unique_ptr<QemuTargetHost>> QemuTargetHost::Create(
    QemuTargetHostOptions options) {
  if (absl::Status s = MakeFolder(options.ram_folder); !s.ok()) return s;
  if (absl::Status s = MakeFolder(options.run_folder); !s.ok()) return s;
  std::unique_ptr<QemuTargetHost> host(new QemuTargetHost(std::move(options)));
  host->RemoveLeftovers();
  return host;
}

absl::StatusOr<std::unique_ptr<TargetPlace>> QemuTargetHost::MakePlace(
    const std::string& guest, const std::vector<RegionRequest>& regions) {
  const auto it = options_.guests.find(guest);
  if (it == options_.guests.end()) {
    return absl::NotFoundError(
        absl::StrCat("guest ", guest, " is not configured here; add [guest.", guest,
                     "] with its QEMU command to this host's presyncd.toml and restart presyncd"));
  }
  uint64_t bytes = 0;
  for (const RegionRequest& region : regions) bytes += region.size_bytes;
  if (options_.max_guest_bytes != 0 && bytes > options_.max_guest_bytes) {
    return absl::ResourceExhaustedError(
        absl::StrCat("guest ", guest, " has ", bytes >> 20, " MiB; this host accepts at most ",
                     options_.max_guest_bytes >> 20, " MiB a guest (max_guest_memory)"));
  }
  if (!it->second.attach_qmp.empty()) return MakeAttachedPlace(it->second.attach_qmp, regions);

  RemoveLeftovers();
  Paths paths = MakePaths(options_, guest, regions);
  if (std::filesystem::exists(paths.note)) {
    return absl::AlreadyExistsError(
        absl::StrCat("guest ", guest, " runs on this host already (", paths.note, ")"));
  }
  absl::StatusOr<std::vector<std::string>> command =
      FillTemplate(it->second.command, guest, paths, regions);
  if (!command.ok()) return command.status();
  absl::StatusOr<GuestMemory> memory = CreateMemory(regions, paths);
  if (!memory.ok()) return memory.status();
  return std::make_unique<StartedPlace>(this, guest, *std::move(command), std::move(paths), regions,
                                        *std::move(memory));
}

absl::Status QemuTargetHost::EndOrphan(const std::string& address) {
  const absl::Time deadline = absl::Now() + kQmpTimeout;
  absl::StatusOr<std::unique_ptr<QemuSourceGuest>> guest =
      OpenOrphan(options_.run_folder, address, deadline);
  if (absl::IsNotFound(guest.status())) return absl::OkStatus();
  if (!guest.ok()) return guest.status();
  const absl::StatusOr<RunState> state = (*guest)->State(deadline);
  if (!state.ok()) return absl::IsUnavailable(state.status()) ? absl::OkStatus() : state.status();
  if (*state == RunState::kRunning) {
    return absl::FailedPreconditionError(
        absl::StrCat("the guest at ", address, " runs, though nobody told it to"));
  }
  return (*guest)->Quit(deadline);
}

absl::Status QemuTargetHost::RunOrphan(const std::string& address) {
  const absl::Time deadline = absl::Now() + kQmpTimeout;
  absl::StatusOr<std::unique_ptr<QemuSourceGuest>> guest =
      OpenOrphan(options_.run_folder, address, deadline);
  if (!guest.ok()) return guest.status();
  const absl::StatusOr<RunState> state = (*guest)->State(deadline);
  if (!state.ok()) return state.status();
  if (*state == RunState::kRunning) return absl::OkStatus();
  if (*state != RunState::kPaused) {
    return absl::FailedPreconditionError(
        absl::StrCat("the guest at ", address, " was told to run, but its state is not loaded"));
  }
  // Where a later handover left it, it has moved on to another host.
  absl::StatusOr<GuestInfo> info = DescribeGuest((*guest)->qmp(), deadline);
  if (!info.ok()) return info.status();
  if (info->run_state == "postmigrate" || info->run_state == "finish-migrate") {
    return absl::FailedPreconditionError(
        absl::StrCat("the guest at ", address,
                     " was told to run here, but its QEMU stands where a "
                     "later handover left it"));
  }
  return (*guest)->qmp().Execute("cont", nullptr, deadline).status();
}

void QemuTargetHost::EndWaitingLeftovers() {
  for (const GuestNote& note : ReadGuestNotes(options_.run_folder)) {
    absl::StatusOr<std::unique_ptr<QemuSourceGuest>> guest =
        OpenOrphan(options_.run_folder, note.qmp, absl::Now() + kQmpTimeout);
    if (!guest.ok()) continue;
    const absl::StatusOr<RunState> state = (*guest)->State(absl::Now() + kQmpTimeout);
    if (state.ok() && *state == RunState::kIncoming) {
      (*guest)->Quit(absl::Now() + kQmpTimeout).IgnoreError();
    }
  }
  RemoveLeftovers();
}

void QemuTargetHost::Adopt(QemuProcess process) {
  MutexLock lock(&mutex_);
  running_.push_back(std::move(process));
}

void QemuTargetHost::RemoveLeftovers() {
  {
    MutexLock lock(&mutex_);
    std::erase_if(running_, [](QemuProcess& process) { return process.HasEnded(); });
  }
  for (const GuestNote& note : ReadGuestNotes(options_.run_folder)) {
    if (IsAlive(note)) continue;
    for (const std::string& path : note.files) RemoveFile(path).IgnoreError();
    RemoveFile(note.path).IgnoreError();
  }
}

}  // namespace presync
