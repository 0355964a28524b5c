#include "tools/presyncd/daemon.h"

#include <spdlog/spdlog.h>

#include <algorithm>
#include <filesystem>
#include <set>
#include <utility>

#include "absl/algorithm/container.h"
#include "absl/strings/str_cat.h"
#include "qemu-glue/target_files.h"
#include "tools/common/local_api.h"
#include "tools/common/units.h"
#include "tools/presyncd/libvirt_api.h"
#include "tools/presyncd/qemu_users_api.h"
#include "tools/presyncd/recording_api.h"
#include "tools/presyncd/session_options.h"
#include "tools/presyncd/status_json.h"
#include "transport/clock.h"
#include "transport/tcp/socket.h"

namespace presync {
namespace {

using Json = nlohmann::json;

// Makes the folders that are a presyncd's own, and takes them: a second one would settle handovers
// that are under way, end QEMUs that wait, and remove their memory.
absl::Status TakeFolders(const Config& config, std::vector<UniqueFd>* locks) {
  std::set<std::filesystem::path> taken;  // one folder may serve for several
  const std::pair<std::string, const char*> folders[] = {{config.state_folder, "state_folder"},
                                                         {config.run_folder, "run_folder"},
                                                         {config.ram_folder, "ram_folder"}};
  for (const auto& [path, setting] : folders) {
    // On a tmpfs of everybody's, /dev/shm itself, memory files are made new or not at all.
    const bool shared = path == config.ram_folder;
    if (absl::Status s = MakeOwnFolder(path, setting, shared); !s.ok()) return s;
    std::error_code error;
    if (!taken.insert(std::filesystem::canonical(path, error)).second) continue;
    absl::StatusOr<UniqueFd> lock = LockFolder(path, setting);
    if (!lock.ok()) return lock.status();
    locks->push_back(*std::move(lock));
  }
  return absl::OkStatus();
}

absl::StatusOr<Decision> ParseDecision(const std::string& where) {
  if (where == "here") return Decision::kRunsHere;
  if (where == "there") return Decision::kRunsThere;
  if (where == "forget") return Decision::kForget;
  if (where == "ran") return Decision::kRan;
  if (where == "never-ran") return Decision::kNeverRan;
  return absl::InvalidArgumentError(
      absl::StrCat("'", where, "' is none of here, there, ran, never-ran and forget"));
}

}  // namespace

void LogLine(bool problem, const std::string& line) {
  spdlog::log(problem ? spdlog::level::warn : spdlog::level::info, "{}", line);
}

Daemon::Daemon(Config config)
    : config_(std::move(config)),
      fixed_costs_(config_.state_folder + "/fixed-costs.json"),
      notes_(config_.state_folder),
      going_on_({.start = [this](const SyncNote& note) { return GoOn(note); }, .log = LogLine}),
      metrics_(std::make_shared<Metrics>([this] { return View(); })) {}

Daemon::~Daemon() {
  metrics_server_.reset();
  going_on_.End();
  ForgetEnded();
  recovery_.reset();
  std::map<std::string, Sync> sources;
  {
    MutexLock lock(&mutex_);
    sources.swap(sources_);
  }
}

absl::StatusOr<std::unique_ptr<Daemon>> Daemon::Create(Config config) {
  if (absl::StatusOr<Compression> c = ToCompression(config.compression); !c.ok()) {
    return c.status();
  }
  std::vector<UniqueFd> locks;
  if (absl::Status s = TakeFolders(config, &locks); !s.ok()) return s;
  std::unique_ptr<Daemon> daemon(new Daemon(std::move(config)));
  daemon->locks_ = std::move(locks);
  const Config& c = daemon->config_;
  absl::StatusOr<std::unique_ptr<Security>> security = Security::Create(c);
  if (!security.ok()) return security.status();
  daemon->security_ = *std::move(security);
  absl::StatusOr<QemuUsers> users = FindQemuUsers(c);
  if (!users.ok()) return users.status();
  if (users->any_apart()) {  // the folders of guests are in it
    if (absl::Status s = LetThrough(c.run_folder); !s.ok()) return s;
  }
  absl::StatusOr<std::unique_ptr<QemuTargetHost>> host =
      QemuTargetHost::Create({.ram_folder = c.ram_folder,
                              .run_folder = GuestsFolder(c),
                              .max_guest_bytes = c.max_guest_bytes,
                              .guests = c.guests,
                              .users = *users,
                              .log = LogLine});
  if (!host.ok()) return host.status();
  absl::StatusOr<std::unique_ptr<LibvirtTargetHost>> libvirt = MakeLibvirtHost(c);
  if (!libvirt.ok()) return libvirt.status();
  daemon->host_ = std::make_unique<GuestHost>(*std::move(host), *std::move(libvirt));
  auto recovery = std::make_unique<RecoveryLoop>(
      c.state_folder, daemon->host_.get(), daemon->security_->peers(), daemon->claims_, LogLine);
  daemon->qemu_users_ = QemuUsersToJson(*users);
  if (const std::string not_apart = NotApart(c, *users); !not_apart.empty()) {
    spdlog::warn("{}", not_apart);
  }
  daemon->host_->qemu()->EndWaitingLeftovers();

  absl::StatusOr<UniqueFd> listener = Listen(c.listen_host, c.listen_port);
  if (!listener.ok()) return listener.status();
  TargetServiceOptions options;
  options.record_folder = c.state_folder;
  options.claims = daemon->claims_;
  options.rdma.enabled = c.rdma;
  options.rdma.addresses = c.rdma_addresses;
  options.log = LogLine;
  daemon->security_->Apply(&options);
  daemon->service_ =
      TargetService::Start(*std::move(listener), daemon->host_.get(), std::move(options));
  const Json mode = daemon->security_->ToJson();
  if (const std::string warning = TextOr(mode, "warning", ""); !warning.empty()) {
    spdlog::warn("{}", warning);
  }
  if (TextOr(mode, "mode", "") == "no-peers") {
    spdlog::warn(
        "no certificates: no guest can come or go until certificate, key and ca are set "
        "(docs/security.md)");
  }
  daemon->recovery_ = std::move(recovery);
  daemon->recovery_->Start(
      [raw = daemon.get()](const std::string& guest) { return raw->InUse(guest); });
  daemon->GoOnWithNotes();
  spdlog::info("listening at {}:{}, {} guests configured to come here", c.listen_host,
               c.listen_port, c.guests.size());
  if (!c.metrics_listen.empty()) {
    absl::StatusOr<std::unique_ptr<MetricsServer>> server =
        MetricsServer::Start(c.metrics_listen, daemon->metrics_);
    if (!server.ok()) return server.status();
    daemon->metrics_server_ = *std::move(server);
    spdlog::info("metrics at http://{}/metrics", c.metrics_listen);
  }
  return daemon;
}

void Daemon::ReloadCertificates() {
  const absl::Status status = security_->Reload();
  LogLine(!status.ok(), status.ok()
                            ? "certificates read again; connections from now on use them"
                            : absl::StrCat("certificates stay as they were: ", status.message()));
}

void Daemon::Tick() {
  host_->qemu()->RemoveLeftovers();
  ForgetEnded();
  for (const SessionStatus& status : Sources()) {
    history_.Sample(status, MonotonicNow());
    metrics_->NoteLink(status);
  }
}

std::vector<SessionStatus> Daemon::Sources() const {
  std::vector<std::shared_ptr<SourceSession>> sessions;
  {
    MutexLock lock(&mutex_);
    for (const auto& [name, sync] : sources_) {
      if (sync.session != nullptr) sessions.push_back(sync.session);
    }
  }
  std::vector<SessionStatus> statuses;
  for (const auto& session : sessions) statuses.push_back(session->status());
  return statuses;
}

// The waiting ones are looked at first: one that goes on meanwhile is seen twice, never not at all.
std::vector<SessionStatus> Daemon::SourcesAndWaiting() const {
  std::vector<SessionStatus> waiting = going_on_.status();
  std::vector<SessionStatus> all = Sources();
  std::set<std::string> names;
  for (const SessionStatus& status : all) names.insert(status.guest);
  for (SessionStatus& status : waiting) {
    if (!names.contains(status.guest)) all.push_back(std::move(status));
  }
  absl::c_sort(all, [](const auto& a, const auto& b) { return a.guest < b.guest; });
  return all;
}

Metrics::View Daemon::View() const {
  Metrics::View view = {.sources = SourcesAndWaiting(), .incoming = service_->status().size()};
  MutexLock lock(&mutex_);
  view.open_matters = recovery_ == nullptr ? 0 : recovery_->open().size();
  return view;
}

std::string Daemon::Summary() const {
  MutexLock lock(&mutex_);
  return absl::StrCat(sources_.size(), " guests kept in sync elsewhere, ",
                      service_->status().size(), " mirrored here");
}

Json Daemon::Handle(const Json& request) {
  const std::string command = TextOr(request, "command", "");
  static constexpr absl::string_view kCommands[] = {"start",   "launch",      "stop",   "record",
                                                    "settle",  "status",      "report", "verify",
                                                    "libvirt", "libvirt-hook"};
  const bool known = absl::c_linear_search(kCommands, command);
  absl::StatusOr<Json> answer = absl::InvalidArgumentError(
      absl::StrCat("no such command: ", command, "; presync and presyncd differ in version?"));
  if (command == "start") answer = Start(request);
  if (command == "launch") answer = Launch(request);
  if (command == "stop") answer = Stop(request);
  if (command == "record") answer = Record(request);
  if (command == "settle") answer = Settle(request);
  if (command == "verify") answer = Verify(request);
  if (command == "status") answer = Status(request);
  if (command == "libvirt") answer = DescribeLibvirt(config_.libvirt);
  if (command == "libvirt-hook") answer = AnswerHook(request, host_->libvirt(), service_.get());
  if (command == "report") answer = history_.Report(TextOr(request, "name", ""));
  if (!answer.ok()) {
    metrics_->NoteError(known ? command : "unknown", answer.status().code());
    spdlog::warn("{} {}: {}", command, TextOr(request, "name", ""),
                 std::string(answer.status().message()));
    return StatusToJson(answer.status());
  }
  (*answer)["ok"] = true;
  return *std::move(answer);
}

std::shared_ptr<SourceSession> Daemon::Find(const std::string& name) const {
  MutexLock lock(&mutex_);
  const auto it = sources_.find(name);
  return it == sources_.end() ? nullptr : it->second.session;
}

absl::StatusOr<std::shared_ptr<SourceSession>> Daemon::SessionOf(const std::string& name) const {
  const std::vector<SessionStatus> waiting = going_on_.status();
  if (std::shared_ptr<SourceSession> session = Find(name); session != nullptr) return session;
  for (const SessionStatus& status : waiting) {
    if (status.guest != name) continue;
    return absl::FailedPreconditionError(
        absl::StrCat(name, " is not kept in sync from here yet again: ", status.problem));
  }
  return absl::NotFoundError(
      absl::StrCat(name, " is not kept in sync from this host; presync start ", name, " first"));
}

// A launch that nobody ordered here: libvirt was told to move its guest.
void Daemon::NoteManagedLaunch(const std::string& name, absl::Time ordered_at,
                               const absl::StatusOr<HandoverReport>& report) {
  const std::shared_ptr<SourceSession> session = Find(name);
  if (session == nullptr) return;
  NoteLaunch(session->status(), ordered_at, report, /*verified=*/false);
  if (!report.ok()) spdlog::warn("{}: launch: {}", name, std::string(report.status().message()));
}

void Daemon::NoteLaunch(const SessionStatus& status, absl::Time ordered_at,
                        const absl::StatusOr<HandoverReport>& report, bool verified) {
  history_.Sample(status, MonotonicNow());
  history_.NoteLaunch(status, ordered_at, report);
  metrics_->NoteLaunch(report);
  if (!report.ok()) return;
  const double link = static_cast<double>(status.progress.link_bytes_per_s);
  // Not what a verification cost, nor what libvirt does by itself, and not a launch whose end was
  // only heard of later.
  if (link > 0 && !verified && report->pages_compared == 0 && !report->managed &&
      report->launch > absl::ZeroDuration()) {
    const double moved = static_cast<double>(PagesToBytes(report->residual_at_launch));
    fixed_costs_.Learn(status.peer, report->launch - absl::Seconds(moved / link));
  }
  spdlog::info("{}: runs on {} after {} (stopped for {})", status.guest, status.peer,
               FormatMillis(report->launch), FormatMillis(report->downtime));
}

absl::StatusOr<Json> Daemon::Launch(const Json& request) {
  const std::string name = TextOr(request, "name", "");
  const absl::Duration wait =
      absl::Milliseconds(std::max<int64_t>(0, NumberOr(request, "wait_ms", 0)));
  AwaitGoingOn(name, wait);
  const absl::StatusOr<std::shared_ptr<SourceSession>> found = SessionOf(name);
  if (!found.ok()) return found.status();
  SourceSession* const session = found->get();
  HandoverOptions options;
  options.verify = FlagOr(request, "verify", false);
  spdlog::info("{}: launch to {}", name, session->status().peer);
  const absl::Time ordered_at = MonotonicNow();
  history_.Sample(session->status(), ordered_at);
  absl::StatusOr<HandoverReport> report = session->Launch(options, wait);
  const SessionStatus status = session->status();
  NoteLaunch(status, ordered_at, report, options.verify);
  ForgetEnded();
  if (!report.ok()) return report.status();
  return LaunchReportToJson(*report, status);
}

absl::StatusOr<Json> Daemon::Record(const Json& request) {
  const std::string name = TextOr(request, "name", "");
  const std::shared_ptr<SourceSession> session = Find(name);
  if (session == nullptr) {
    return absl::NotFoundError(
        absl::StrCat(name,
                     " is not kept in sync from this host; with --qmp presync record opens a "
                     "guest by itself"));
  }
  return AnswerRecord(session->recording(), session->pages(), request);
}

bool Daemon::InUse(const std::string& guest) const {
  for (const TargetStatus& target : service_->status()) {
    if (target.guest == guest) return true;
  }
  MutexLock lock(&mutex_);
  const auto it = sources_.find(guest);
  if (it == sources_.end()) return false;
  return it->second.session == nullptr || !IsOver(it->second.session->status().state);
}

// What only a person can know: where the guest of an open handover runs.
absl::StatusOr<Json> Daemon::Settle(const Json& request) {
  const std::string name = TextOr(request, "name", "");
  absl::StatusOr<Decision> decision = ParseDecision(TextOr(request, "where", ""));
  if (!decision.ok()) return decision.status();
  const Word word = {.decision = *decision, .force = FlagOr(request, "force", false)};
  const bool of_source =
      word.decision == Decision::kRunsHere || word.decision == Decision::kRunsThere;
  const std::shared_ptr<SourceSession> session = Find(name);
  const bool live = session != nullptr && !IsOver(session->status().state);
  absl::StatusOr<std::string> done = absl::FailedPreconditionError(
      absl::StrCat(name, " is kept in sync from here; say where it runs: here or there"));
  if (!live) {
    done = recovery_->Decide(name, word);
  } else if (of_source) {
    done = session->Decide(word);
  }
  if (!done.ok()) return done.status();
  return Json{{"done", *done}};
}

Json Daemon::Status(const Json& request) const {
  const std::string name = TextOr(request, "name", "");
  Json answer = {{"guests", Json::array()},
                 {"incoming", Json::array()},
                 {"open", Json::array()},
                 {"open_matters", Json::array()}};
  answer["security"] = security_->ToJson();
  answer["qemu"] = qemu_users_;
  for (const OpenMatter& matter : recovery_->open()) {
    if (!name.empty() && matter.entry.guest != name) continue;
    answer["open"].push_back(MatterText(matter));
    answer["open_matters"].push_back(MatterToJson(matter));
  }
  for (const SessionStatus& status : SourcesAndWaiting()) {
    if (name.empty() || status.guest == name)
      answer["guests"].push_back(SourceStatusToJson(status));
  }
  for (const TargetStatus& target : service_->status()) {
    if (name.empty() || target.guest == name)
      answer["incoming"].push_back(TargetStatusToJson(target));
  }
  return answer;
}

}  // namespace presync
