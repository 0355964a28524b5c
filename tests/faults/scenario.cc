#include "tests/faults/scenario.h"

#include <sys/socket.h>
#include <unistd.h>

#include <array>
#include <atomic>
#include <cstdio>
#include <filesystem>
#include <memory>
#include <mutex>
#include <optional>
#include <shared_mutex>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/time/clock.h"
#include "predictor/check.h"
#include "tests/faults/machines.h"
#include "tests/faults/network.h"
#include "tests/faults/side.h"
#include "transport/clock.h"
#include "transport/mutex.h"
#include "transport/sync/departures.h"
#include "transport/sync/recovery.h"
#include "transport/sync/source_session.h"
#include "transport/sync/target_service.h"
#include "transport/tcp/socket.h"

namespace presync {
namespace {

// How long a handover may stand still here; faults last up to twice as long.
constexpr absl::Duration kSwitchover = absl::Milliseconds(400);
// Long beyond anything that a run waits for: whoever gets here has found a hang.
constexpr absl::Duration kPatience = absl::Seconds(30);

class Scenario {
 public:
  Scenario(const Plan& plan, bool log);
  ~Scenario();
  Outcome Run();

 private:
  struct Target {
    std::unique_ptr<Life> life;
    std::unique_ptr<TargetHost> host;
    std::unique_ptr<RecoveryHost> recovery_host;
    std::unique_ptr<Recovery> recovery;
    UniqueFd listener;  // a second hold on the service's, to wake it
    std::unique_ptr<TargetService> service;
  };
  struct Source {
    std::unique_ptr<Life> life;
    std::unique_ptr<RecoveryHost> recovery_host;
    std::unique_ptr<Recovery> recovery;
    std::shared_ptr<SourceSession> session;
  };

  void StartTarget(const std::string& folder);
  void EndTarget();
  void StartSource(const std::string& folder);
  void EndSource();
  absl::Status StartSession();
  GuestMemory MapMemory();
  absl::StatusOr<HandoverReport> Launch();

  void OnStep(const std::string& step, bool before);
  FrameFault OnFrame(const std::string& message, bool before);
  void StrikeAtMoments(bool in_sync, absl::Time begin);
  void Hit(size_t index);
  void Later(absl::Duration after, std::function<void()> what);
  void Settle(bool wrong);
  void ServiceLooks();
  void PersonLooks();
  void Heal();

  bool RestartCrashed();
  bool AwaitSettled();
  void Judge(const char* when);
  void MoveOnce();
  void Wrong(const std::string& text) { absl::StrAppend(&outcome_.text, text, "; "); }
  std::string NewFolder() { return absl::StrCat(folder_, "/", ++folders_); }
  std::function<void(bool, const std::string&)> Logger(const char* who) const;

  const Plan plan_;
  const bool log_;
  std::string folder_;
  std::atomic<int> folders_ = 0;
  Machines machines_;
  Monitor source_monitor_, target_monitor_;
  // The network's threads look at them until it ends.
  std::vector<std::unique_ptr<Life>> past_lives_;
  Network network_;
  std::atomic<bool> no_room_ = false;
  std::atomic<bool> service_ = false;
  std::shared_mutex source_mutex_;  // a person's word is whole before the source's presyncd ends
  std::array<std::atomic<bool>, 8> hit_ = {};
  std::shared_mutex strike_mutex_;   // a strike is whole before healing begins
  std::atomic<bool> armed_ = false;  // faults may come
  std::atomic<bool> healed_ = false;
  std::string source_durable_, target_durable_;  // where a crash leaves the records
  Mutex later_mutex_;
  std::vector<std::thread> later_ ABSL_GUARDED_BY(later_mutex_);
  std::vector<std::unique_ptr<RecoveryHost>> past_hosts_;
  Target target_;
  Source source_;
  Outcome outcome_;
};

Scenario::Scenario(const Plan& plan, bool log)
    : plan_(plan),
      log_(log),
      machines_(plan.seed),
      source_monitor_([this](const std::string& step, bool before) { OnStep(step, before); }),
      target_monitor_([this](const std::string& step, bool before) { OnStep(step, before); }),
      network_(plan.seed + 1, [this](const std::string& message, bool before) {
        return OnFrame(message, before);
      }) {
  char name[] = "/tmp/presync-faults-XXXXXX";
  folder_ = ::mkdtemp(name);
  for (const char* side : {"source", "target"})
    std::filesystem::create_directory(folder_ + "/" + side);
  source_durable_ = folder_ + "/source-after-crash";
  target_durable_ = folder_ + "/target-after-crash";
}

Scenario::~Scenario() {
  EndSource();
  EndTarget();
  std::filesystem::remove_all(folder_);
}

std::function<void(bool, const std::string&)> Scenario::Logger(const char* who) const {
  if (!log_) return [](bool, const std::string&) {};
  return [who](bool problem, const std::string& line) {
    std::fprintf(stderr, "%s %s%s: %s\n",
                 absl::FormatTime("%H:%M:%E3S", absl::Now(), absl::UTCTimeZone()).c_str(), who,
                 problem ? " !" : "", line.c_str());
  };
}

// Both presyncds. ---------------------------------------------------------------------------------

void Scenario::StartTarget(const std::string& folder) {
  target_.life = std::make_unique<Life>(folder);
  Life* const life = target_.life.get();
  target_.host = MakeTargetHost(&machines_, &target_monitor_, life, &no_room_);
  target_.recovery_host = MakeRecoveryHost(&machines_, &target_monitor_, life, nullptr);
  target_.recovery = std::make_unique<Recovery>(
      Recovery::Options{.folder = folder, .log = Logger("target")}, target_.recovery_host.get());
  HandoverRecord::RemoveUnused(folder);
  target_.recovery->Pass([](const std::string&) { return false; });
  // As QemuTargetHost::EndWaitingLeftovers.
  if (const auto vm = machines_.target()) {
    machines_.MoveTarget(vm.get(), {VmState::kWaiting}, VmState::kGone);
  }
  absl::StatusOr<UniqueFd> listener = Listen("127.0.0.1", 0);
  PRESYNC_CHECK(listener.ok());
  target_.listener.reset(::dup(listener->get()));
  TargetServiceOptions options;
  options.record_folder = folder;
  options.rdma.enabled = false;
  options.make_link = network_.TargetLinks(life);
  options.preamble_timeout = absl::Milliseconds(500);
  options.idle_timeout = absl::Milliseconds(1500);
  options.log = Logger("target");
  target_.service = TargetService::Start(*std::move(listener), target_.host.get(), options);
  network_.SetTarget(target_.service.get(), life);
}

void Scenario::EndTarget() {
  if (target_.life == nullptr) return;
  network_.SetTarget(nullptr, target_.life.get());
  ::shutdown(target_.listener.get(), SHUT_RDWR);  // its acceptor would look only now and then
  target_.service.reset();
  target_.recovery.reset();
  past_hosts_.push_back(std::move(target_.recovery_host));
  target_.host.reset();
  past_lives_.push_back(std::move(target_.life));
}

void Scenario::StartSource(const std::string& folder) {
  source_.life = std::make_unique<Life>(folder);
  Life* const life = source_.life.get();
  const auto ask = [this, life](const HandoverEntry& entry, bool end_it) {
    const std::unique_ptr<Dialer> dialer = network_.MakeDialer(life);
    return AskOutcome(dialer.get(), entry.session, entry.guest, end_it,
                      MonotonicNow() + kSwitchover);
  };
  source_.recovery_host = MakeRecoveryHost(&machines_, &source_monitor_, life, ask);
  source_.recovery = std::make_unique<Recovery>(
      Recovery::Options{.folder = folder, .log = Logger("source")}, source_.recovery_host.get());
  HandoverRecord::RemoveUnused(folder);
  source_.recovery->Pass([](const std::string&) { return false; });
}

void Scenario::EndSource() {
  std::unique_lock lock(source_mutex_);
  if (source_.life == nullptr) return;
  source_.session.reset();
  source_.recovery.reset();
  past_hosts_.push_back(std::move(source_.recovery_host));
  past_lives_.push_back(std::move(source_.life));
}

// The session owns a mapping of its own, as presyncd does.
GuestMemory Scenario::MapMemory() {
  std::vector<Region> regions;
  for (const Region& region : machines_.source_memory().memory().regions()) {
    absl::StatusOr<Region> again = Region::Adopt(region.name(), "the guest's memory",
                                                 UniqueFd(::dup(region.fd())), region.size_bytes());
    PRESYNC_CHECK(again.ok());
    regions.push_back(*std::move(again));
  }
  return *GuestMemory::Create(std::move(regions));
}

absl::Status Scenario::StartSession() {
  {
    std::unique_lock lock(source_mutex_);
    source_.session.reset();
  }
  Life* const life = source_.life.get();
  SourceSessionOptions options;
  options.guest = "g1";
  options.guest_address = "the source's QEMU";
  options.record_folder = life->record_folder();
  options.sync.scan_interval = absl::Milliseconds(5);
  options.sync.settle_after = absl::Milliseconds(40);
  options.look_every = options.settle_few_every = absl::Milliseconds(15);
  options.sync.max_launch_time = options.sync.fixed_cost;  // a set-point of 0: everything is sent
  options.transport = Transport::kTcp;
  options.make_link = network_.SourceLinks(&machines_.source_memory().memory(), life);
  options.connect_timeout = absl::Milliseconds(700);
  options.reconnect_every = absl::Milliseconds(10);
  options.log = Logger("source");
  auto session = SourceSession::Start(options, network_.MakeDialer(life), MapMemory(),
                                      MakeSourceLog(&machines_, life),
                                      MakeSourceGuest(&machines_, &source_monitor_, life));
  std::unique_lock lock(source_mutex_);
  if (session.ok()) source_.session = *std::move(session);
  return session.status();
}

absl::StatusOr<HandoverReport> Scenario::Launch() {
  HandoverOptions options;
  options.verify = plan_.verify;
  options.switchover_timeout = kSwitchover;
  options.rounds_timeout = absl::Seconds(2);
  return source_.session->Launch(options, absl::Seconds(3));
}

// Faults. -----------------------------------------------------------------------------------------

void Scenario::OnStep(const std::string& step, bool before) {
  for (size_t i = 0; i < plan_.strikes.size(); ++i) {
    if (plan_.strikes[i].step == step && plan_.strikes[i].before == before) Hit(i);
  }
}

FrameFault Scenario::OnFrame(const std::string& message, bool before) {
  for (size_t i = 0; i < plan_.strikes.size(); ++i) {
    const Strike& strike = plan_.strikes[i];
    if (strike.step != message || strike.before != before || !armed_ || hit_[i]) continue;
    const std::optional<FrameFault> fault =
        strike.fault == Fault::kControlTruncated    ? std::optional(FrameFault::kTruncate)
        : strike.fault == Fault::kControlDuplicated ? std::optional(FrameFault::kDuplicate)
        : strike.fault == Fault::kControlCorrupted  ? std::optional(FrameFault::kCorrupt)
        : strike.fault == Fault::kControlDelayed    ? std::optional(FrameFault::kDelay)
                                                    : std::nullopt;
    if (!fault) {
      Hit(i);
      continue;
    }
    hit_[i] = true;
    return *fault;
  }
  return FrameFault::kNone;
}

void Scenario::StrikeAtMoments(bool in_sync, absl::Time begin) {
  for (size_t i = 0; i < plan_.strikes.size(); ++i) {
    const Strike& strike = plan_.strikes[i];
    if (!strike.step.empty() || strike.in_sync != in_sync) continue;
    Later(begin + strike.at - MonotonicNow(), [this, i] { Hit(i); });
  }
}

void Scenario::Later(absl::Duration after, std::function<void()> what) {
  MutexLock lock(&later_mutex_);
  later_.emplace_back([this, after, what = std::move(what)] {
    const absl::Time at = MonotonicNow() + after;
    while (MonotonicNow() < at && !healed_) {
      absl::SleepFor(std::min(absl::Milliseconds(2), at - MonotonicNow()));
    }
    what();
  });
}

void Scenario::Hit(size_t index) {
  std::shared_lock lock(strike_mutex_);
  if (!armed_ || hit_[index].exchange(true)) return;
  const Strike& strike = plan_.strikes[index];
  const auto restore = [&](std::function<void()> undo) { Later(strike.lasts, std::move(undo)); };
  switch (strike.fault) {
    case Fault::kCrashSource:
      return source_.life->Crash(source_durable_);
    case Fault::kCrashTarget:
      target_.life->Crash(target_durable_);
      return machines_.NoteTargetCrashed();
    case Fault::kCrashBoth:
      source_.life->Crash(source_durable_);
      target_.life->Crash(target_durable_);
      return machines_.NoteTargetCrashed();
    case Fault::kStopSource:
      return source_.life->Stop(strike.lasts);
    case Fault::kStopTarget:
      return target_.life->Stop(strike.lasts);
    case Fault::kKillSourceQemu:
      return machines_.KillSource();
    case Fault::kKillTargetQemu:
      return machines_.KillTarget();
    case Fault::kEndTargetQemu:
      return machines_.EndTarget();
    case Fault::kLinkDown:
      network_.SetDown(true);
      return restore([this] { network_.SetDown(false); });
    case Fault::kLinkFlaps:
      for (int i = 1; i < 4; ++i) {
        Later(i * strike.lasts / 4, [this, i] { network_.SetDown(i % 2 == 0); });
      }
      network_.SetDown(true);
      return restore([this] { network_.SetDown(false); });
    case Fault::kLinkReset:
      return network_.Reset();
    case Fault::kLinkSilent:
      network_.SetSilent(true);
      return restore([this] { network_.SetSilent(false); });
    case Fault::kNoRoom:
      no_room_ = true;
      return restore([this] { no_room_ = false; });
    case Fault::kSlowReads:
      return machines_.ReadSlowly();
    case Fault::kReadHangs:
      return machines_.HangARead(strike.lasts);
    case Fault::kSourceMonitorErrs:
      return source_monitor_.Break(MonitorFault::kError);
    case Fault::kSourceMonitorCloses:
      return source_monitor_.Break(MonitorFault::kClosed);
    case Fault::kSourceMonitorStalls:
      return source_monitor_.Break(MonitorFault::kSlow);
    case Fault::kTargetMonitorErrs:
      return target_monitor_.Break(MonitorFault::kError);
    case Fault::kTargetMonitorCloses:
      return target_monitor_.Break(MonitorFault::kClosed);
    case Fault::kTargetMonitorStalls:
      return target_monitor_.Break(MonitorFault::kSlow);
    case Fault::kContSource:
      hit_[index] = machines_.ContSource();
      return;
    case Fault::kContTarget:
      hit_[index] = machines_.ContTarget();
      return;
    case Fault::kPauseTarget:
      hit_[index] = machines_.PauseTarget();
      return;
    case Fault::kQuitTarget:
      return machines_.KillTarget();
    case Fault::kMigrateAway:
      hit_[index] = machines_.MigrateAway();
      return;
    case Fault::kService:
      service_ = true;
      return;
    case Fault::kSettleRight:
    case Fault::kSettleWrong:
      // Whoever is at this step may have to answer the person.
      return Later(strike.lasts,
                   [this, wrong = strike.fault == Fault::kSettleWrong] { Settle(wrong); });
    default:
      return;
  }
}

// A person looks at both hosts, and types what they saw; or the opposite, and insists.
void Scenario::Settle(bool wrong) {
  // Who types looks first whether anything is open; most often nothing is.
  for (int i = 0; i < 100 && !healed_; ++i) {
    {
      std::shared_lock lock(source_mutex_);
      if (source_.session != nullptr && source_.session->status().state == SessionState::kInDoubt) {
        break;
      }
    }
    absl::SleepFor(absl::Milliseconds(5));
  }
  std::shared_lock lock(source_mutex_);
  if (source_.life == nullptr || source_.life->crashed()) return;
  const bool there = machines_.target_runs();
  if (!there && !wrong && machines_.target_lives()) return;  // nobody can be certain
  const Word word = {.decision = there != wrong ? Decision::kRunsThere : Decision::kRunsHere,
                     .force = wrong};
  const bool live = source_.session != nullptr && !IsOver(source_.session->status().state);
  if (live && source_.session->status().state != SessionState::kInDoubt) return;
  if (wrong) machines_.NoteForced();
  if (live) {
    source_.session->Decide(word).status().IgnoreError();
  } else {
    source_.recovery->Decide("g1", word, [](const std::string&) { return false; })
        .status()
        .IgnoreError();
  }
}

// What a unit with Restart=always does, and its ExecCondition=.
void Scenario::ServiceLooks() {
  if (!service_ || machines_.source_state() != VmState::kGone) return;
  const std::string folder =
      source_.life->crashed() ? source_durable_ : source_.life->record_folder();
  if (CheckMayStart(folder, "g1").ok()) machines_.StartSourceAgain();
}

// Nothing is broken any more; what is under way may still be late.
void Scenario::Heal() {
  {
    std::unique_lock lock(strike_mutex_);
    armed_ = false;
  }
  healed_ = true;
  std::vector<std::thread> late;
  {
    MutexLock lock(&later_mutex_);
    late.swap(later_);
  }
  for (std::thread& thread : late) thread.join();
  network_.SetDown(false);
  network_.SetSilent(false);
  network_.SetLinkFaults({});
  no_room_ = false;
  source_monitor_.Break(MonitorFault::kNone);
  target_monitor_.Break(MonitorFault::kNone);
  source_.life->Continue();
  target_.life->Continue();
  machines_.ContPaused();  // who paused it goes on with it
}

// The run. ----------------------------------------------------------------------------------------

bool Scenario::RestartCrashed() {
  if (source_.life->crashed()) {
    EndSource();
    StartSource(source_durable_);
  }
  if (target_.life->crashed()) {
    EndTarget();
    StartTarget(target_durable_);
  }
  return true;
}

// Waits until no session is in a handover and nothing is open, as RecoveryLoop does in presyncd.
bool Scenario::AwaitSettled() {
  const absl::Time deadline = MonotonicNow() + kPatience;
  std::string what;
  while (MonotonicNow() < deadline) {
    const bool live = source_.session != nullptr && !IsOver(source_.session->status().state);
    source_.recovery->Pass([&](const std::string&) { return live; });
    target_.recovery->Pass([&](const std::string& guest) {
      for (const TargetStatus& status : target_.service->status()) {
        if (status.guest == guest && status.state != "lost") return true;
      }
      return false;
    });
    source_.recovery->HoldGivenUp([&](const std::string&) { return live; });
    ServiceLooks();
    PersonLooks();
    what.clear();
    if (live) {
      const SessionStatus status = source_.session->status();
      if (status.state == SessionState::kLaunching || status.state == SessionState::kInDoubt ||
          status.state == SessionState::kStuck) {
        what = absl::StrCat("the session is ", StateName(status.state), ": ", status.problem);
      }
    }
    for (const Recovery* recovery : {source_.recovery.get(), target_.recovery.get()}) {
      for (const OpenMatter& matter : recovery->open()) {
        // A guest whose QEMU was killed is a person's matter, and status says so.
        const bool persons =
            machines_.guest_killed() || machines_.forced() || machines_.restarted();
        if (!(persons && matter.for_a_person)) what = MatterText(matter);
      }
    }
    // What a person made so presync, or the person, ends in a moment.
    if (machines_.running() > 1 && machines_.by_hand()) what = "two run by hand";
    if (what.empty()) return true;
    absl::SleepFor(absl::Milliseconds(3));
  }
  outcome_.restart_failed = machines_.running() <= 1;  // two that last are judged as such
  Wrong(absl::StrCat("not settled: ", what));
  return false;
}

// Somebody ran the guest that waited at the target. As docs/reliability.md has it: where it runs at
// its source, too, that one is ended; else it is said to be the one.
void Scenario::PersonLooks() {
  // It ran by hand for a moment, and has ended: whoever did that knows that its disks are as
  // before.
  const std::shared_ptr<Machines::TargetVm> vm = machines_.target();
  if (vm != nullptr && machines_.RanUntold(*vm) && !machines_.target_lives() &&
      !machines_.guest_killed()) {
    target_.recovery
        ->Decide("g1", {.decision = Decision::kNeverRan, .force = true},
                 [](const std::string&) { return false; })
        .status()
        .IgnoreError();
  }
  for (const OpenMatter& matter : target_.recovery->open()) {
    // Its QEMU ended before it was told to run: nothing was written from there.
    if (matter.for_a_person && matter.entry.phase == HandoverPhase::kToldToRun &&
        !machines_.target_lives() && !machines_.guest_killed()) {
      target_.recovery
          ->Decide("g1", {.decision = Decision::kNeverRan},
                   [](const std::string&) { return false; })
          .status()
          .IgnoreError();
      continue;
    }
    if (!matter.for_a_person || !machines_.by_hand()) continue;
    const bool given_up = !CheckMayStart(source_.life->record_folder(), "g1").ok();
    if (machines_.source_runs() || !given_up) {
      machines_.EndStrayTarget();
      continue;
    }
    const absl::Status said =
        target_.recovery
            ->Decide("g1", {.decision = Decision::kRan}, [](const std::string&) { return false; })
            .status();
    if (said.ok() && machines_.target() != nullptr)
      machines_.LetTargetRun(machines_.target().get());
  }
}

void Scenario::Judge(const char* when) {
  outcome_.doubled_by_force = outcome_.doubled_by_force || machines_.two_by_force();
  if (machines_.running() > 1 && !machines_.forced() && !machines_.ever_two()) {
    outcome_.doubled_unnoticed = true;
    Wrong(absl::StrCat(when, ": two guests run, and nobody knows: ", machines_.Describe()));
  }
  if (machines_.ever_two()) {
    outcome_.doubled = true;
    Wrong(absl::StrCat(when, ": two guests ran"));
  }
  if (machines_.running() == 0 && !machines_.guest_killed() && machines_.forced()) {
    outcome_.lost_by_force = true;
  } else if (machines_.running() == 0 && !machines_.guest_killed()) {
    outcome_.lost = true;
    Wrong(absl::StrCat(when, ": no guest runs: ", machines_.Describe()));
  }
  const std::vector<PageIndex> wrong = machines_.WrongPages();
  if (!wrong.empty()) {
    outcome_.pages_differing += wrong.size();
    Wrong(absl::StrCat(when, ": ", wrong.size(), " pages are wrong, first ", wrong.front(), ": ",
                       machines_.Describe()));
  }
}

// presync works again: a guest that is still here can be launched, now that nothing is broken.
void Scenario::MoveOnce() {
  const absl::Time deadline = MonotonicNow() + kPatience;
  absl::Status last;
  while (MonotonicNow() < deadline && !machines_.target_runs()) {
    if (source_.session == nullptr || IsOver(source_.session->status().state)) {
      last = StartSession();
      if (!last.ok()) {
        absl::SleepFor(absl::Milliseconds(10));
        continue;
      }
    }
    last = Launch().status();
    if (!last.ok()) absl::SleepFor(absl::Milliseconds(10));
  }
  if (!machines_.target_runs()) {
    outcome_.restart_failed = true;
    Wrong(absl::StrCat("presync can't move the guest afterwards: ", last.message()));
    return;
  }
  AwaitSettled();
  Judge("after the launch without faults");
}

Outcome Scenario::Run() {
  FakeLinkFaults link_faults;
  for (const Strike& strike : plan_.strikes) {
    if (strike.fault != Fault::kLinkFails) continue;
    const uint64_t n = 1 + plan_.seed % 40;
    if (plan_.seed % 4 == 0) link_faults.fail_post = n;
    if (plan_.seed % 4 == 1) link_faults.fail_poll = 5 * n;
    if (plan_.seed % 4 == 2) link_faults.fail_commit = 1 + n / 4;
    if (plan_.seed % 4 == 3) link_faults.drop_after_writes = n;
    hit_[static_cast<size_t>(&strike - plan_.strikes.data())] = true;
  }
  StartTarget(folder_ + "/target");
  StartSource(folder_ + "/source");
  network_.SetLinkFaults(link_faults);
  armed_ = true;
  StrikeAtMoments(/*in_sync=*/true, MonotonicNow());
  // presync start is refused while something is broken; a person types it again.
  for (int i = 0; i < 3 && !StartSession().ok() && !source_.life->crashed(); ++i) {
    absl::SleepFor(absl::Milliseconds(5));
  }
  if (source_.session != nullptr && !source_.life->crashed()) {
    StrikeAtMoments(/*in_sync=*/false, MonotonicNow());
    Launch().status().IgnoreError();
  }
  outcome_.struck = hit_[0] || plan_.strikes[0].fault == Fault::kNone;
  Heal();
  RestartCrashed();
  if (AwaitSettled()) {
    Judge("after the fault");
    outcome_.what = machines_.elsewhere()     ? "moved elsewhere"
                    : machines_.restarted()   ? "started again"
                    : machines_.target_runs() ? "moved"
                    : machines_.source_runs() ? "stayed"
                                              : "guest killed";
    const bool usual = !machines_.restarted() && !machines_.elsewhere() && !machines_.forced();
    if (outcome_.ok() && usual && machines_.source_runs()) MoveOnce();
  } else {
    Judge("not settled");
  }
  return outcome_;
}

}  // namespace

Outcome RunPlan(const Plan& plan, bool log) { return Scenario(plan, log).Run(); }

}  // namespace presync
