#include "qemu-glue/qemu_target_host.h"

#include <sys/un.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <filesystem>
#include <set>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_replace.h"
#include "absl/time/clock.h"
#include "qemu-glue/copy_note.h"
#include "qemu-glue/discovery.h"
#include "qemu-glue/guest_notes.h"
#include "qemu-glue/process_identity.h"
#include "qemu-glue/qemu_guest.h"
#include "qemu-glue/qemu_log.h"
#include "qemu-glue/qemu_target_place.h"
#include "qemu-glue/qmp/listener.h"
#include "qemu-glue/qmp/qmp_client.h"
#include "qemu-glue/target_files.h"
#include "transport/clock.h"

namespace presync {
namespace {

// A QEMU answers its monitor within a second; a loaded machine under emulation takes some.
constexpr absl::Duration kQmpTimeout = absl::Seconds(10);

// What is still ending when presyncd starts has ended by then, or does not end.
constexpr absl::Duration kEndingTimeout = absl::Seconds(10);

GuestPaths PathsOf(const QemuTargetHostOptions& options, const std::string& guest,
                   const std::vector<RegionRequest>& regions) {
  std::vector<std::string> names;
  for (const RegionRequest& region : regions) names.push_back(region.name);
  return MakePaths(options.run_folder, options.ram_folder, guest, names);
}

// The memory backends that a command names: {ram.ID}.
std::set<std::string> RegionsIn(const std::vector<std::string>& command) {
  constexpr absl::string_view kOpen = "{ram.";
  std::set<std::string> regions;
  for (const absl::string_view argument : command) {
    for (size_t at = argument.find(kOpen); at != absl::string_view::npos;
         at = argument.find(kOpen, at + 1)) {
      const size_t begin = at + kOpen.size();
      const size_t close = argument.find('}', begin);
      if (close == absl::string_view::npos) break;
      const absl::string_view name = argument.substr(begin, close - begin);
      if (IsPlainName(name)) regions.emplace(name);
    }
  }
  return regions;
}

absl::Status CheckSocketPath(const std::string& path) {
  if (path.size() < sizeof(sockaddr_un::sun_path)) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat("its socket ", path, " would have ", path.size(), " bytes, of at most ",
                   sizeof(sockaddr_un::sun_path) - 1, ": choose a shorter name or folder"));
}

// "{word}" where a placeholder may be meant; JSON has a quote behind its brace.
absl::Status CheckPlaceholders(absl::string_view argument) {
  for (size_t open = argument.find('{'); open != absl::string_view::npos;
       open = argument.find('{', open + 1)) {
    const size_t close = argument.find('}', open);
    if (close == absl::string_view::npos) break;
    const absl::string_view word = argument.substr(open + 1, close - open - 1);
    const bool known = word == "qmp" || word == "glue" || word == "name" || word == "folder" ||
                       (absl::StartsWith(word, "ram.") && word.size() > 4);
    if (known || !IsPlainName(word)) continue;
    return absl::InvalidArgumentError(absl::StrCat(
        "{", word, "} in its command means nothing; there are {qmp}, {glue}, {folder}, {name} ",
        "and {ram.ID} for the file of the memory backend ID"));
  }
  return absl::OkStatus();
}

absl::Status CheckCommand(const std::vector<std::string>& command) {
  bool has_qmp = false;
  for (const std::string& argument : command) {
    if (argument == "-daemonize" || argument == "--daemonize") {
      return absl::InvalidArgumentError(
          "its command has -daemonize: leave it out, for presyncd has to know QEMU's process, and "
          "a QEMU that it starts runs on without it");
    }
    if (absl::Status s = CheckPlaceholders(argument); !s.ok()) return s;
    has_qmp |= absl::StrContains(argument, "{qmp}");
  }
  if (has_qmp) return absl::OkStatus();
  return absl::InvalidArgumentError(
      "its command lacks {qmp}, the monitor's socket: add \"-qmp\", "
      "\"unix:{qmp},server=on,wait=off\"");
}

absl::StatusOr<std::vector<std::string>> FillTemplate(const std::vector<std::string>& command,
                                                      const std::string& guest,
                                                      const GuestPaths& paths,
                                                      const std::vector<RegionRequest>& regions) {
  std::vector<std::pair<std::string, std::string>> values = {
      {"{qmp}", paths.qmp}, {"{glue}", paths.glue}, {"{folder}", paths.folder}, {"{name}", guest}};
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

// Connects to the very process that is meant, never to another one that was given its socket since.
// NOT_FOUND: it has ended.
absl::StatusOr<std::unique_ptr<QemuSourceGuest>> OpenProcess(const std::string& qmp_path, pid_t pid,
                                                             uint64_t start_ticks,
                                                             absl::Time deadline) {
  const auto lives = [&] { return IsAlive(pid, start_ticks); };
  absl::Status ended = absl::NotFoundError(
      absl::StrCat("the QEMU that waited at ", qmp_path, " (process ", pid, ") has ended"));
  if (!lives()) return ended;
  absl::StatusOr<std::unique_ptr<QmpClient>> qmp = QmpClient::Connect(qmp_path, deadline);
  // One that is just starting has no monitor yet, and is no QEMU that has ended.
  while ((absl::IsNotFound(qmp.status()) || absl::IsUnavailable(qmp.status())) && lives()) {
    if (MonotonicNow() >= deadline) return absl::DeadlineExceededError(qmp.status().message());
    absl::SleepFor(absl::Milliseconds(10));
    qmp = QmpClient::Connect(qmp_path, deadline);
  }
  if (!lives()) return ended;
  if (!qmp.ok()) return qmp.status();
  if ((*qmp)->peer_pid() != pid) {
    return absl::AbortedError(absl::StrCat("the QEMU that waited at ", qmp_path, " (process ", pid,
                                           ") lives, but its socket is another process's now (",
                                           (*qmp)->peer_pid(), ")"));
  }
  return QemuSourceGuest::Create(*std::move(qmp), deadline);
}

// The QEMU of a record. Records of older presyncds do not name the process: a note may, and without
// one only an address at which nobody listens is a QEMU's that has ended. FAILED_PRECONDITION:
// somebody does.
absl::StatusOr<std::unique_ptr<QemuSourceGuest>> OpenOrphan(const std::string& folder,
                                                            const HandoverEntry& entry,
                                                            absl::Time deadline) {
  const std::string& qmp_path = entry.detail;
  if (const ProcessIdentity process = ParseProcess(entry.process); process.known()) {
    if (!Lives(process)) {
      return absl::NotFoundError(
          absl::StrCat("the QEMU at ", qmp_path, " (process ", process.pid, ") has ended"));
    }
    return OpenProcess(qmp_path, process.pid, process.start_ticks, deadline);
  }
  for (const GuestNote& note : ReadGuestNotes(folder)) {
    if (note.qmp != qmp_path) continue;
    return OpenProcess(qmp_path, note.pid, note.start_ticks, deadline);
  }
  if (ListenerLives(qmp_path)) {
    return absl::FailedPreconditionError(
        absl::StrCat("the record, of an older presyncd, does not say which process waited at ",
                     qmp_path, ", and a QEMU answers there: look whether it is the one"));
  }
  return absl::NotFoundError(absl::StrCat("the QEMU at ", qmp_path, " has ended"));
}

}  // namespace

absl::Status CheckGuestConfig(const std::string& name, const TargetGuestConfig& guest,
                              const std::string& run_folder) {
  if (!IsPlainName(name)) {
    return absl::InvalidArgumentError(
        "a guest's name has letters, digits, '-', '_' and '.', at most 128 of them, and does not "
        "begin with '.'");
  }
  if (!guest.attach_qmp.empty()) return CheckSocketPath(guest.attach_qmp);
  const GuestPaths paths = MakePaths(run_folder, "", name, {});
  for (const std::string& socket : {paths.qmp, paths.glue}) {
    if (absl::Status s = CheckSocketPath(socket); !s.ok()) return s;
  }
  return CheckCommand(guest.command);
}

absl::StatusOr<std::unique_ptr<QemuTargetHost>> QemuTargetHost::Create(
    QemuTargetHostOptions options) {
  if (absl::Status s = MakeOwnFolder(options.ram_folder, "ram_folder", /*shared=*/true); !s.ok()) {
    return s;
  }
  if (absl::Status s = MakeOwnFolder(options.run_folder, "run_folder", /*shared=*/false); !s.ok()) {
    return s;
  }
  if (options.users.any_apart()) {
    for (const std::string& folder : {options.ram_folder, options.run_folder}) {
      if (absl::Status s = LetThrough(folder); !s.ok()) return s;
    }
  }
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
  if (absl::Status s = CheckGuestSize(guest, regions, options_.max_guest_bytes); !s.ok()) return s;
  if (!it->second.attach_qmp.empty()) return MakeAttachedPlace(it->second.attach_qmp, regions);

  RemoveLeftovers();
  GuestPaths paths = PathsOf(options_, guest, regions);
  if (std::filesystem::exists(paths.note)) {
    return absl::AlreadyExistsError(
        absl::StrCat("guest ", guest, " runs on this host already (", paths.note, ")"));
  }
  absl::StatusOr<std::vector<std::string>> command =
      FillTemplate(it->second.command, guest, paths, regions);
  if (!command.ok()) return command.status();
  if (absl::Status s = RemoveFile(paths.copy); !s.ok()) return s;
  absl::StatusOr<GuestMemory> memory = CreateMemory(regions, paths);
  if (!memory.ok()) return memory.status();
  return MakeStartedPlace(this, guest, *std::move(command), std::move(paths), regions,
                          *std::move(memory), /*fresh=*/true);
}

absl::Status QemuTargetHost::EndOrphan(const HandoverEntry& entry) {
  const std::string& address = entry.detail;
  const absl::Time deadline = MonotonicNow() + kQmpTimeout;
  absl::StatusOr<std::unique_ptr<QemuSourceGuest>> guest =
      OpenOrphan(options_.run_folder, entry, deadline);
  if (absl::IsNotFound(guest.status())) return absl::OkStatus();
  if (!guest.ok()) return guest.status();
  const absl::StatusOr<RunState> state = (*guest)->State(deadline);
  if (!state.ok()) return state.status();
  if (*state == RunState::kGone) return absl::OkStatus();
  if (*state == RunState::kRunning) {
    return absl::AlreadyExistsError(
        absl::StrCat("the guest at ", address, " runs, though nobody told it to"));
  }
  return (*guest)->Kill(deadline);  // its memory may be a copy, which it could empty
}

absl::Status QemuTargetHost::RunOrphan(const HandoverEntry& entry) {
  const std::string& address = entry.detail;
  const absl::Time deadline = MonotonicNow() + kQmpTimeout;
  absl::StatusOr<std::unique_ptr<QemuSourceGuest>> guest =
      OpenOrphan(options_.run_folder, entry, deadline);
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
        OpenProcess(note.qmp, note.pid, note.start_ticks, MonotonicNow() + kQmpTimeout);
    if (!guest.ok()) continue;
    const absl::StatusOr<RunState> state = (*guest)->State(MonotonicNow() + kQmpTimeout);
    if (state.ok() && *state == RunState::kIncoming) {
      (*guest)->Kill(MonotonicNow() + kQmpTimeout).IgnoreError();
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
  // A copy's memory outlives its QEMU.
  std::set<std::string> copied;
  for (const CopyNote& note : ReadCopyNotes(options_.run_folder)) {
    for (const CopiedFile& file : note.files) copied.insert(file.path);
  }
  for (const GuestNote& note : ReadGuestNotes(options_.run_folder)) {
    if (IsAlive(note)) {
      CutLongQemuLog(MakePaths(options_.run_folder, "", note.guest, {}).log);
    } else {
      RemoveEnded(note, copied);
    }
  }
}

// Only what this host's own configuration, or this guest's own note, gives a name in our folders.
void QemuTargetHost::RemoveEnded(const GuestNote& note, const std::set<std::string>& copied) {
  std::set<std::string> regions(note.regions.begin(), note.regions.end());
  const auto it = options_.guests.find(note.guest);
  if (it != options_.guests.end()) regions.merge(RegionsIn(it->second.command));
  const GuestPaths paths = MakePaths(options_.run_folder, options_.ram_folder, note.guest,
                                     {regions.begin(), regions.end()});
  for (const std::string& path : paths.ram) {
    if (!copied.contains(path)) RemoveFile(path).IgnoreError();
  }
  RemoveTraces(paths);
  if (!regions.empty()) return;
  options_.log(true,
               absl::StrCat(note.guest, ": its QEMU, which an earlier presyncd started, has ",
                            "ended, and it is not configured here any more: remove its memory ",
                            "yourself, ", options_.ram_folder, "/", note.guest, ".*.ram"));
}

absl::StatusOr<std::optional<ProcessUser>> QemuTargetHost::UserOf(const std::string& guest) {
  const std::vector<GuestNote> notes = ReadGuestNotes(options_.run_folder);
  MutexLock lock(&mutex_);
  std::set<uid_t> taken;
  for (const auto& [other, uid] : users_) {
    if (other != guest) taken.insert(uid);
  }
  for (const GuestNote& note : notes) {
    if (note.guest != guest) taken.insert(note.uid);
  }
  absl::StatusOr<std::optional<ProcessUser>> user = options_.users.Choose(guest, taken);
  if (user.ok() && user->has_value()) users_[guest] = (*user)->uid;
  return user;
}

std::vector<KeptPlace> QemuTargetHost::TakeKept(
    const std::function<bool(const CopyOwner&)>& may_be_used) {
  std::vector<KeptPlace> kept;
  for (const CopyNote& note : ReadCopyNotes(options_.run_folder)) {
    absl::StatusOr<std::unique_ptr<TargetPlace>> place = TakeUp(note);
    if (place.ok() && !may_be_used(note.owner)) {
      place = absl::FailedPreconditionError("a handover of it was begun");
    }
    if (place.ok()) {
      kept.push_back({note.owner, *std::move(place)});
      continue;
    }
    RemoveFile(note.path).IgnoreError();
    options_.log(true,
                 absl::StrCat(note.owner.guest, ": the copy that an earlier presyncd left is ",
                              "not taken up: ", place.status().message()));
  }
  return kept;
}

// The place, which is destroyed with the memory. Errors leave the memory's files alone unless they
// are certainly this copy's, and nobody uses them.
absl::StatusOr<std::unique_ptr<TargetPlace>> QemuTargetHost::TakeUp(const CopyNote& note) {
  const absl::Time deadline = MonotonicNow() + kEndingTimeout;
  while (IsAlive(note.holder_pid, note.holder_start_ticks) && MonotonicNow() < deadline) {
    absl::SleepFor(absl::Milliseconds(10));
  }
  if (IsAlive(note.holder_pid, note.holder_start_ticks)) {
    return absl::FailedPreconditionError(
        absl::StrCat("the presyncd that held it (process ", note.holder_pid, ") still lives"));
  }
  std::vector<RegionRequest> regions;
  for (const CopiedFile& file : note.files) regions.push_back(file.region);
  GuestPaths paths = PathsOf(options_, note.owner.guest, regions);
  if (paths.copy != note.path) return absl::FailedPreconditionError("its note is another guest's");
  do {
    RemoveLeftovers();
    if (!std::filesystem::exists(paths.note)) break;
    absl::SleepFor(absl::Milliseconds(10));
  } while (MonotonicNow() < deadline);
  if (std::filesystem::exists(paths.note)) {
    return absl::FailedPreconditionError("a QEMU lives that uses its memory");
  }
  absl::StatusOr<GuestMemory> memory = ReopenMemory(regions, paths);
  if (!memory.ok()) return memory.status();
  if (FilesOf(*memory) != note.files) {
    return absl::FailedPreconditionError("its memory files are not the ones that it was made of");
  }
  std::vector<std::string> command;
  absl::Status usable = absl::NotFoundError("the guest is not configured here any more");
  if (const auto it = options_.guests.find(note.owner.guest);
      it != options_.guests.end() && it->second.attach_qmp.empty()) {
    absl::StatusOr<std::vector<std::string>> filled =
        FillTemplate(it->second.command, note.owner.guest, paths, regions);
    usable = filled.status();
    if (filled.ok()) command = *std::move(filled);
  }
  std::unique_ptr<TargetPlace> place =
      MakeStartedPlace(this, note.owner.guest, std::move(command), std::move(paths),
                       std::move(regions), *std::move(memory), /*fresh=*/false);
  if (!usable.ok()) return usable;  // and with the place goes the memory
  return place;
}

}  // namespace presync
