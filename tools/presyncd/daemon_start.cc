// How syncs of this host begin, go on after a restart of presyncd, and end.
#include <spdlog/spdlog.h>

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "tools/common/local_api.h"
#include "tools/presyncd/daemon.h"
#include "tools/presyncd/libvirt_api.h"
#include "tools/presyncd/session_options.h"
#include "tools/presyncd/status_json.h"
#include "transport/clock.h"
#include "transport/sync/departures.h"
#include "transport/sync/handover_record.h"
#include "transport/tcp/socket.h"

namespace presync {
namespace {

using Json = nlohmann::json;

constexpr absl::Duration kOpenTimeout = absl::Seconds(20);
// A start that is under way: opening the guest, and the first link.
constexpr absl::Duration kLongestStart = absl::Seconds(45);
// Of a sync that is there already: as long as the first link of a new one may take.
constexpr absl::Duration kConnectTimeout = absl::Seconds(20);

// Whether a sync does what `presync start` asks for: keeps the guest's memory there.
bool IsMirroring(SessionState state) {
  return state == SessionState::kConnecting || state == SessionState::kFirstPass ||
         state == SessionState::kSyncing;
}

// Whatever moved it, no record says so any more, or never did.
absl::Status CheckNotLeft(const GuestInfo& info) {
  if (info.run_state != "postmigrate") return absl::OkStatus();
  return absl::FailedPreconditionError(
      "its QEMU stands where a migration left it (postmigrate), and the guest may run "
      "elsewhere: look where it runs, and never resume it here while it may; if it certainly runs "
      "nowhere, `cont` by hand");
}

absl::StatusOr<Json> AnswerRunning(SourceSession* running) {
  const bool connected = running->AwaitConnected(kConnectTimeout);
  const SessionStatus status = running->status();
  const std::string known =
      absl::StrCat(status.guest, " is already kept in sync with ", status.peer);
  if (!connected) {
    return absl::UnavailableError(absl::StrCat(known, ", but has no link: ", status.problem,
                                               "; it is tried again every second"));
  }
  if (!IsMirroring(status.state)) {
    return absl::FailedPreconditionError(
        absl::StrCat(status.guest, " is ", StateName(status.state), ": ", status.problem));
  }
  spdlog::info("{}", known);
  return SourceStatusToJson(status);
}

}  // namespace

// Whom a request is about: a domain of libvirt's, or whoever answers at a monitor.
absl::StatusOr<Daemon::Asked> Daemon::WhoIsAsked(const Json& request) const {
  absl::StatusOr<HostAndPort> to = ParseHostPort(TextOr(request, "to", ""), kDefaultPort);
  if (!to.ok()) return to.status();
  Asked asked = {.name = TextOr(request, "name", ""), .to = *to, .order = SyncOrder(request)};
  asked.order["to"] = FormatHostPort(to->host, to->port);
  asked.open = {.qmp_path = TextOr(request, "qmp", ""),
                .glue_path = TextOr(request, "glue", ""),
                .dirty_log = TextOr(asked.order, "dirty_log", config_.dirty_log)};
  const std::string name = TextOr(request, "domain", "");
  if (name.empty()) {
    if (asked.name.empty()) return absl::InvalidArgumentError("start: which guest? Give its name");
    return asked;
  }
  absl::StatusOr<Domain> domain = FindDomain(config_.libvirt, name);
  if (!domain.ok()) return domain.status();
  asked.name = domain->name;
  asked.domain = domain->uuid;
  asked.order["domain"] = domain->uuid;
  asked.open.qmp_path = domain->qmp_path;
  asked.open.glue_path = domain->glue_path;
  asked.open.make_guest = MakeDomainGuest(config_.libvirt, *domain, to->host);
  return asked;
}

absl::StatusOr<SourceSessionOptions> Daemon::OptionsFor(const Asked& asked) {
  const absl::Duration fixed_cost =
      fixed_costs_.For(TextOr(asked.order, "to", ""), config_.fixed_cost);
  absl::StatusOr<SourceSessionOptions> options =
      ReadSessionOptions(asked.order, config_, fixed_cost);
  if (!options.ok()) return options;
  options->guest = asked.name;
  options->guest_address = asked.open.qmp_path;
  options->domain = asked.domain;
  options->log = LogLine;
  options->on_managed_launch = [this, name = asked.name](
                                   absl::Time ordered_at,
                                   const absl::StatusOr<HandoverReport>& report) {
    NoteManagedLaunch(name, ordered_at, report);
  };
  return options;
}

// While it is open who may run the guest, no sync of it begins: recovery leaves the records of a
// guest alone that a session has in its hands. The records are asked, not recovery: what it passes
// over while a start is under way is open all the same.
absl::Status Daemon::CheckSettled(const std::string& name) const {
  std::vector<std::string> unreadable;
  bool open = false;
  for (const HandoverEntry& entry : HandoverRecord::ReadAll(config_.state_folder, &unreadable)) {
    // One that somebody else ran here is over when its QEMU has ended, which recovery looks at.
    const bool settled = IsSettled(entry.phase) || entry.phase == HandoverPhase::kRanUntold;
    open |= entry.guest == name && !settled;
  }
  for (const std::string& path : unreadable) open |= HandoverRecord::MayBeOf(path, name);
  if (!open) return CheckMayStart(config_.state_folder, name);
  std::string known = "presync status shows what is known";
  for (const OpenMatter& matter : recovery_->open()) {
    const bool its = matter.entry.guest.empty() ? HandoverRecord::MayBeOf(matter.path, name)
                                                : matter.entry.guest == name;
    if (its) known = MatterText(matter);
  }
  return absl::FailedPreconditionError(
      absl::StrCat("an earlier handover has to be settled first: ", known));
}

// Waits until no start of the guest is under way; false: one is still.
bool Daemon::AwaitNoStart(const std::string& name, absl::Duration longest) {
  const auto none_under_way = [&] {
    mutex_.AssertHeld();
    const auto it = sources_.find(name);
    return it == sources_.end() || it->second.session != nullptr;
  };
  return mutex_.AwaitWithTimeout(none_under_way, longest);
}

// Takes the guest's name for a start; an ended session makes room. Or finds that what is asked for
// is there already: then `*running` is that session.
absl::Status Daemon::Claim(const Asked& asked, absl::Duration longest,
                           std::shared_ptr<SourceSession>* running) {
  const std::string& name = asked.name;
  std::shared_ptr<SourceSession> ended;
  // From its entry on the guest is in use; until then recovery may be at its QEMU.
  const GuestClaims::Claim claim = claims_->Take(name, longest);
  if (!claim.held()) {
    return absl::AlreadyExistsError(
        absl::StrCat("an earlier handover of ", name, " is just being looked at; try again"));
  }
  MutexLock lock(&mutex_);
  if (!AwaitNoStart(name, longest)) {
    return absl::AlreadyExistsError(absl::StrCat("a start of ", name, " is already under way"));
  }
  const auto it = sources_.find(name);
  if (it != sources_.end()) {
    const SessionStatus status = it->second.session->status();
    if (!IsOver(status.state)) {
      const bool same = it->second.order == asked.order;
      if (same && IsMirroring(status.state)) {
        *running = it->second.session;
        return absl::OkStatus();
      }
      return absl::AlreadyExistsError(absl::StrCat(
          name, " is already kept in sync with ", status.peer, " (", StateName(status.state), ")",
          same ? "" : ", started with other options", "; presync stop ", name, " ends that"));
    }
    ended = std::move(it->second.session);
  }
  sources_[name] = {};
  return absl::OkStatus();
}

void Daemon::Unclaim(const std::string& name) {
  MutexLock lock(&mutex_);
  const auto it = sources_.find(name);
  if (it != sources_.end() && it->second.session == nullptr) sources_.erase(it);
}

// Of a guest whose name is claimed.
Daemon::SessionOr Daemon::Begin(const Asked& asked, SourceSessionOptions options) {
  absl::StatusOr<OpenedGuest> opened = OpenGuest(asked.open, MonotonicNow() + kOpenTimeout);
  if (!opened.ok()) return opened.status();
  options.guest_process = FormatProcess(opened->process);
  for (const std::string& note : opened->notes) spdlog::info("{}: {}", asked.name, note);
  if (!asked.domain.empty()) {
    spdlog::info(
        "{}: whether the target fits is found out at the launch: libvirt makes its QEMU there "
        "then, "
        "of the same domain",
        asked.name);
  }
  options.rdma.memory_may_be_discarded = opened->memory_may_be_discarded;
  const bool goes_on = options.connect_later;
  absl::StatusOr<std::unique_ptr<SourceSession>> started = SourceSession::Start(
      std::move(options),
      std::make_unique<TcpDialer>(asked.to.host, asked.to.port, security_->peers()),
      std::move(opened->memory), std::move(opened->log), std::move(opened->guest));
  if (!started.ok()) return started.status();
  std::shared_ptr<SourceSession> session = *std::move(started);
  if (absl::Status s = Publish(asked, session, *opened, goes_on); !s.ok()) {
    session->Stop().IgnoreError();
    return s;
  }
  return session;
}

// A sync that began is known from here on, also to a later presyncd.
absl::Status Daemon::Publish(const Asked& asked, const std::shared_ptr<SourceSession>& session,
                             const OpenedGuest& opened, bool goes_on) {
  MutexLock note_lock(&notes_mutex_);
  if (!opened.process.known()) {
    spdlog::warn(
        "{}: presync can't tell which process its QEMU is, so its sync does not go on by "
        "itself after a restart of presyncd",
        asked.name);
    notes_.Remove(asked.name).IgnoreError();
  } else if (!goes_on) {
    const absl::Status written =
        notes_.Write({.guest = asked.name, .order = asked.order, .qemu = opened.process});
    if (!written.ok()) {
      notes_.Remove(asked.name).IgnoreError();
      return written;
    }
  }
  MutexLock lock(&mutex_);
  sources_[asked.name] = {
      .session = session, .order = asked.order, .stop_tracking = opened.stop_tracking};
  return absl::OkStatus();
}

absl::StatusOr<Json> Daemon::Start(const Json& request) {
  ForgetEnded();
  absl::StatusOr<Asked> asked = WhoIsAsked(request);
  if (!asked.ok()) return asked.status();
  std::shared_ptr<SourceSession> running;
  if (absl::Status s = Claim(*asked, kLongestStart, &running); !s.ok()) return s;
  if (running != nullptr) return AnswerRunning(running.get());
  const auto begin = [&]() -> SessionOr {
    if (absl::Status s = CheckSettled(asked->name); !s.ok()) return s;
    absl::StatusOr<SourceSessionOptions> options = OptionsFor(*asked);
    if (!options.ok()) return options.status();
    asked->open.check = [](const GuestInfo& info, const ProcessIdentity&) {
      return CheckNotLeft(info);
    };
    const std::string peer = TextOr(asked->order, "to", "");
    if (absl::Status s = CheckPromise(options->sync, peer); !s.ok()) return s;
    return Begin(*asked, *std::move(options));
  };
  const SessionOr session = begin();
  if (!session.ok()) {
    Unclaim(asked->name);
    return session.status();
  }
  going_on_.Forget(asked->name);
  const SessionStatus status = (*session)->status();
  spdlog::info("{}: in sync with {} from now on ({} MiB, dirty log {})", status.guest, status.peer,
               status.progress.pages >> 8, status.dirty_log);
  return SourceStatusToJson(status);
}

void Daemon::GoOnWithNotes() {
  std::vector<std::string> unreadable;
  std::vector<SyncNote> notes;
  {
    MutexLock lock(&notes_mutex_);
    notes = notes_.ReadAll(&unreadable);
  }
  for (const std::string& each : unreadable) {
    spdlog::warn(
        "the note of a sync can't be read, and that sync does not go on: {}; presync start "
        "it again, or remove the file",
        each);
  }
  going_on_.Begin(std::move(notes));
}

// One try, in a thread of going_on_.
GoingOn::Try Daemon::GoOn(const SyncNote& note) {
  const std::string process = absl::StrCat("its QEMU (process ", note.qemu.pid, ")");
  if (!Lives(note.qemu)) return GiveUp(note, absl::StrCat(process, " has ended"));
  if (absl::Status s = CheckSettled(note.guest); !s.ok()) return {.status = s};
  absl::StatusOr<Asked> asked = WhoIsAsked(note.order);
  if (!asked.ok()) return {.status = asked.status()};
  if (asked->name != note.guest) {
    return {.status = absl::FailedPreconditionError(
                absl::StrCat("libvirt calls it ", asked->name, " now"))};
  }
  bool another = false;
  asked->open.check = [&](const GuestInfo& info, const ProcessIdentity& found) {
    another = found.known() && (found.pid != note.qemu.pid || !Lives(note.qemu));
    if (another) {
      return absl::FailedPreconditionError(
          absl::StrCat("another QEMU (process ", found.pid, ") answers where ", process, " did"));
    }
    if (!found.known()) return absl::UnavailableError("presync can't tell which process it is");
    return CheckNotLeft(info);
  };
  absl::StatusOr<SourceSessionOptions> options = OptionsFor(*asked);
  if (!options.ok()) return {.status = options.status()};
  options->connect_later = true;
  std::shared_ptr<SourceSession> running;
  if (absl::Status s = Claim(*asked, absl::ZeroDuration(), &running); !s.ok()) return {.status = s};
  if (running != nullptr) return {};
  // Whoever says otherwise waits for a start that is under way: from the claim on it is.
  const SessionOr session = going_on_.Wants(note.guest)
                                ? Begin(*asked, *std::move(options))
                                : absl::CancelledError("presyncd ends, or it was stopped");
  if (!session.ok()) {
    Unclaim(note.guest);
    if (another) return GiveUp(note, std::string(session.status().message()));
    return {.status = session.status()};
  }
  spdlog::info("{}: the sync with {} goes on", note.guest, (*session)->status().peer);
  return {};
}

// Its note goes: nothing can come of it any more.
GoingOn::Try Daemon::GiveUp(const SyncNote& note, const std::string& why) {
  MutexLock lock(&notes_mutex_);
  if (Find(note.guest) == nullptr && going_on_.Wants(note.guest)) {
    if (absl::Status s = notes_.Remove(note.guest); !s.ok()) {
      spdlog::warn("{}: {}", note.guest, std::string(s.message()));
    }
  }
  return {.status = absl::NotFoundError(why), .for_good = true};
}

// A command that finds a guest whose sync is just being started again can wait for that.
void Daemon::AwaitGoingOn(const std::string& name, absl::Duration longest) const {
  const absl::Time until = MonotonicNow() + std::min(longest, kLongestStart);
  while (Find(name) == nullptr && going_on_.Wants(name) && MonotonicNow() < until) {
    absl::SleepFor(absl::Milliseconds(20));
  }
}

void Daemon::ForgetEnded() {
  MutexLock note_lock(&notes_mutex_);
  std::vector<std::string> ended;
  {
    MutexLock lock(&mutex_);
    for (const auto& [name, sync] : sources_) {
      if (sync.session == nullptr) continue;
      const SessionState state = sync.session->status().state;
      if (state == SessionState::kMoved || state == SessionState::kFailed) ended.push_back(name);
    }
  }
  for (const std::string& name : ended) {
    if (absl::Status s = notes_.Remove(name); !s.ok()) {
      spdlog::warn("{}: {}", name, std::string(s.message()));
    }
  }
}

absl::StatusOr<Json> Daemon::Stop(const Json& request) {
  const std::string name = TextOr(request, "name", "");
  SessionStatus before;  // of what is stopped: it may have ended by itself long ago
  for (SessionStatus& status : SourcesAndWaiting()) {
    if (status.guest == name) before = std::move(status);
  }
  const bool waited = going_on_.Forget(name);
  std::shared_ptr<SourceSession> session;
  {
    MutexLock lock(&mutex_);
    if (!AwaitNoStart(name, kLongestStart)) {
      return absl::FailedPreconditionError(
          absl::StrCat("a start of ", name, " is under way; try again"));
    }
    if (const auto it = sources_.find(name); it != sources_.end()) session = it->second.session;
  }
  if (session == nullptr && !waited) {
    return absl::NotFoundError(absl::StrCat(name, " is not kept in sync from this host"));
  }
  if (session != nullptr) {
    if (absl::Status s = session->Stop(); !s.ok()) return s;
    before = session->status();
  }
  spdlog::info("{}: sync stopped", name);
  Sync ended;
  absl::Status removed;
  {
    MutexLock note_lock(&notes_mutex_);
    MutexLock lock(&mutex_);
    const auto it = sources_.find(name);
    if (session != nullptr && it != sources_.end() && it->second.session == session) {
      ended = std::move(it->second);
      sources_.erase(it);
    }
    // Not that of a sync which was started meanwhile.
    if (!sources_.contains(name)) removed = notes_.Remove(name);
  }
  session.reset();
  ended.session.reset();  // and with it the dirty log, unless a status request still looks at it
  if (ended.stop_tracking != nullptr) {
    if (absl::Status s = ended.stop_tracking(); !s.ok()) {
      spdlog::info("{}: its QEMU keeps the userfaultfd on its memory: {}", name,
                   std::string(s.message()));
    }
  }
  if (!removed.ok()) return removed;
  const bool by_itself = IsOver(before.state);
  return Json{{"name", name},
              {"state", std::string(StateName(by_itself ? before.state : SessionState::kStopped))},
              {"to", before.peer},
              {"problem", by_itself ? before.problem : ""}};
}

}  // namespace presync
