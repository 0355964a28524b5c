#include "qemu-glue/libvirt/libvirt_source_guest.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "qemu-glue/libvirt/unix_socket.h"
#include "qemu-glue/qemu_guest_calls.h"
#include "transport/clock.h"

namespace presync {
namespace {

// libvirt's own preparations on the target, from its hook on, take about a second; a loaded machine
// some more. After this RAM is no longer left out of what libvirt saves.
constexpr absl::Duration kExpectFor = absl::Minutes(2);
// QEMU connects just before it says "active"; what it says until then is about an earlier
// migration.
constexpr absl::Duration kSettling = absl::Seconds(2);
constexpr absl::Duration kLookAgain = absl::Milliseconds(10);
// A QEMU that saves writes something more often.
constexpr absl::Duration kQuiet = absl::Seconds(2);
// How long libvirt may take to see that its migration failed, or is over, before presync sees to
// it.
constexpr absl::Duration kLibvirtsTurn = absl::Seconds(5);
// How long QEMU may leave the target's answer unread: some bytes, which it waits for.
constexpr absl::Duration kTakesAnswer = absl::Seconds(5);

}  // namespace

absl::StatusOr<std::unique_ptr<LibvirtSourceGuest>> LibvirtSourceGuest::Create(
    std::unique_ptr<QmpClient> qmp, LibvirtSourceOptions options, absl::Time deadline) {
  absl::StatusOr<PeerProcess> process = PeerProcess::Identify(*qmp, deadline);
  if (!process.ok()) return process.status();
  absl::StatusOr<UniqueFd> listener = ListenUnix(options.stream_path);
  if (!listener.ok()) return listener.status();
  options.move.stream_uri = absl::StrCat("unix://", options.stream_path);
  std::unique_ptr<LibvirtSourceGuest> guest(new LibvirtSourceGuest(
      std::move(qmp), *std::move(process), std::move(options), *std::move(listener)));
  if (absl::Status s = guest->SetIgnoreShared(false, deadline); !s.ok()) return s;
  return guest;
}

LibvirtSourceGuest::LibvirtSourceGuest(std::unique_ptr<QmpClient> qmp, PeerProcess process,
                                       LibvirtSourceOptions options, UniqueFd listener)
    : qmp_(std::move(qmp)),
      process_(std::move(process)),
      watch_(process_.pid()),
      options_(std::move(options)),
      libvirt_(options_.libvirt_uri),
      listener_(std::move(listener)) {}

LibvirtSourceGuest::~LibvirtSourceGuest() {
  if (OrderUnderWay()) libvirt_.AbortJob(options_.uuid).IgnoreError();
  DropStream();
  Forget();
  requests_.Undo(*qmp_);
  if (order_.joinable()) order_.join();
  if (listener_.valid()) ::unlink(options_.stream_path.c_str());
}

absl::Status LibvirtSourceGuest::SetIgnoreShared(bool on, absl::Time deadline) {
  if (absl::Status s = ReviveMonitor(&qmp_, process_, deadline); !s.ok()) return s;
  const Json capability = {{"capability", "x-ignore-shared"}, {"state", on}};
  return qmp_
      ->Execute("migrate-set-capabilities", {{"capabilities", Json::array({capability})}}, deadline)
      .status();
}

// Before a launch ---------------------------------------------------------------------------------

absl::Status LibvirtSourceGuest::Expect(absl::Time deadline) {
  if (stream_.valid()) return absl::FailedPreconditionError("a launch of it is under way already");
  if (absl::Status s = ReviveMonitor(&qmp_, process_, deadline); !s.ok()) return s;
  absl::StatusOr<MigrationState> migration = QueryMigration(*qmp_, deadline);
  if (!migration.ok()) return migration.status();
  if (!IsMigrationOver(migration->status)) {
    return absl::FailedPreconditionError(
        absl::StrCat("a migration of it is under way already (", migration->status, ")"));
  }
  if (absl::Status s = SetIgnoreShared(true, deadline); !s.ok()) return s;
  expected_until_ = MonotonicNow() + kExpectFor;
  return absl::OkStatus();
}

// While RAM is left out, libvirt must not save the guest for anything else: a `virsh save` would
// lose the RAM. So the capability goes as soon as no launch is to come.
void LibvirtSourceGuest::Forget() {
  if (!expected() || stream_.valid()) return;
  const absl::Status off = SetIgnoreShared(false, MonotonicNow() + absl::Seconds(5));
  // QEMU refuses while a migration is under way, and then the next call comes.
  if (off.ok() || process_.HasEnded()) expected_until_ = absl::InfinitePast();
}

bool LibvirtSourceGuest::OrderUnderWay() const {
  MutexLock lock(&mutex_);
  return ordering_;
}

absl::Status LibvirtSourceGuest::Order() {
  if (OrderUnderWay()) {
    return absl::AlreadyExistsError("libvirt was told to move it already, and is not done");
  }
  if (order_.joinable()) order_.join();
  MutexLock lock(&mutex_);
  order_end_.reset();
  ordering_ = true;
  order_ = std::thread([this] {
    absl::Status end = libvirt_.Move(options_.uuid, options_.move);
    MutexLock done(&mutex_);
    order_end_ = std::move(end);
    ordering_ = false;
  });
  return absl::OkStatus();
}

std::optional<absl::Status> LibvirtSourceGuest::TakeOrderEnd() {
  MutexLock lock(&mutex_);
  return std::exchange(order_end_, std::nullopt);
}

bool LibvirtSourceGuest::Begun() {
  if (stream_.valid()) return true;
  if (expected() && MonotonicNow() > expected_until_) Forget();
  if (!listener_.valid()) return false;
  UniqueFd stream(::accept4(listener_.get(), nullptr, nullptr, SOCK_CLOEXEC | SOCK_NONBLOCK));
  if (!stream.valid()) return false;
  // The target was not asked: its hook is missing there, or another one writes to us. Closing the
  // connection makes the migration fail and the guest go on here.
  if (!expected() || !IsFromQemu(stream.get(), process_)) return false;
  begun_at_ = MonotonicNow();
  stream_ = std::move(stream);
  return true;
}

// The launch --------------------------------------------------------------------------------------

absl::Status LibvirtSourceGuest::PrepareSave(absl::Time) { return absl::OkStatus(); }

absl::StatusOr<UniqueFd> LibvirtSourceGuest::BeginSave(absl::Time) {
  if (!stream_.valid()) return absl::FailedPreconditionError("libvirt has not begun to save it");
  UniqueFd copy(::fcntl(stream_.get(), F_DUPFD_CLOEXEC, 0));
  int ends[2];
  if (!copy.valid() || ::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends) != 0) {
    return absl::ResourceExhaustedError(absl::StrCat("device state: ", std::strerror(errno)));
  }
  saved_ = std::make_unique<SavedStream>(std::move(copy), UniqueFd(ends[1]));
  return UniqueFd(ends[0]);
}

// Whether the other end of the stream is gone.
bool LibvirtSourceGuest::StreamBroken() const {
  pollfd p = {.fd = stream_.get(), .events = POLLRDHUP, .revents = 0};
  return !stream_.valid() || (::poll(&p, 1, 0) > 0 && (p.revents & (POLLHUP | POLLRDHUP)) != 0);
}

absl::Status LibvirtSourceGuest::AwaitSaved(std::string_view step,
                                            std::initializer_list<std::string_view> wanted,
                                            absl::Time deadline) {
  while (true) {
    if (absl::Status s = ReviveMonitor(&qmp_, process_, deadline); !s.ok()) return s;
    absl::StatusOr<MigrationState> state = AwaitMigration(*qmp_, step, wanted, deadline);
    if (state.ok()) return absl::OkStatus();
    const bool settling = absl::IsFailedPrecondition(state.status()) && !StreamBroken() &&
                          MonotonicNow() < begun_at_ + kSettling;
    if (!settling) return state.status();
    absl::SleepFor(absl::Milliseconds(2));
  }
}

absl::StatusOr<absl::Time> LibvirtSourceGuest::Stop(absl::Time deadline) {
  // libvirt has it pause before the switchover, and lets it go on at once.
  absl::Status stopped =
      AwaitSaved("stop the guest", {"pre-switchover", "device", "completed"}, deadline);
  if (!stopped.ok()) return stopped;
  absl::Time at = MonotonicNow();
  for (const QmpEvent& stop : qmp_->TakeEvents("STOP")) {
    if (stop.at >= begun_at_ - kSettling) at = std::min(at, stop.at);
  }
  return at;
}

absl::Status LibvirtSourceGuest::FinishSave(absl::Time deadline) {
  if (saved_ == nullptr) return absl::FailedPreconditionError("its saving was not begun");
  while (true) {
    const absl::Status whole = saved_->AwaitWhole(std::min(deadline, MonotonicNow() + kLookAgain));
    if (!absl::IsDeadlineExceeded(whole)) return whole;
    if (MonotonicNow() >= deadline) return whole;
    if (absl::Status s = AwaitSaved("save the device state", {"device", "completed"}, deadline);
        !s.ok()) {
      return s;
    }
    // A machine that does not describe its state: what has come then is all.
    if (MonotonicNow() - saved_->quiet_since() > kQuiet) saved_->TakeAsWhole();
  }
}

// What the target's QEMU answers: that it has loaded everything is what libvirt waits for.
absl::Status LibvirtSourceGuest::TakeReturn(absl::string_view bytes) {
  if (stream_.valid() &&
      WriteToSocket(stream_.get(), {bytes.data(), bytes.size()}, MonotonicNow() + kTakesAnswer)) {
    return absl::OkStatus();
  }
  return absl::UnavailableError("QEMU does not wait for the target's answer any more");
}

void LibvirtSourceGuest::DropStream() {
  if (!stream_.valid()) return;
  ::shutdown(stream_.get(), SHUT_RDWR);
  saved_.reset();
  stream_.reset();
}

// Whether libvirt is done with its migration and the guest stands or runs as it did before.
absl::StatusOr<bool> LibvirtSourceGuest::IsBack(absl::Time deadline) {
  if (absl::Status s = ReviveMonitor(&qmp_, process_, deadline); !s.ok()) return s;
  absl::StatusOr<MigrationState> migration = QueryMigration(*qmp_, deadline);
  if (!migration.ok()) return migration.status();
  absl::StatusOr<std::string> run_state = QueryRunState(*qmp_, deadline);
  if (!run_state.ok()) return run_state.status();
  // Paused: by a person, while libvirt was at it.
  return IsMigrationOver(migration->status) && (*run_state == "running" || *run_state == "paused");
}

absl::Status LibvirtSourceGuest::Resume(absl::Time deadline) {
  DropStream();
  absl::Time libvirts_turn = MonotonicNow() + kLibvirtsTurn;
  while (true) {
    const absl::StatusOr<bool> back = IsBack(deadline);
    if (!back.ok() && !absl::IsDeadlineExceeded(back.status())) return back.status();
    if (back.ok() && *back) break;
    const absl::Time now = MonotonicNow();
    if (now >= deadline) {
      return absl::DeadlineExceededError("libvirt did not take its migration back in time");
    }
    if (now >= libvirts_turn) {
      const absl::StatusOr<DomainJob> job = libvirt_.Job(options_.uuid);
      if (job.ok() && *job == DomainJob::kNone) libvirt_.Resume(options_.uuid).IgnoreError();
      libvirts_turn = now + kLibvirtsTurn;
    }
    absl::SleepFor(kLookAgain);
  }
  Forget();
  return absl::OkStatus();
}

absl::Status LibvirtSourceGuest::StandsStill(absl::Time deadline) {
  if (absl::Status s = ReviveMonitor(&qmp_, process_, deadline); !s.ok()) return s;
  absl::StatusOr<std::string> run_state = QueryRunState(*qmp_, deadline);
  if (!run_state.ok()) return run_state.status();
  if (*run_state == "postmigrate" || *run_state == "finish-migrate") return absl::OkStatus();
  return absl::FailedPreconditionError(
      absl::StrCat("libvirt has taken its migration back: the guest is '", *run_state, "' here"));
}

absl::Status LibvirtSourceGuest::HoldStill(absl::Time deadline) {
  if (process_.HasEnded()) return absl::OkStatus();
  if (absl::Status s = ReviveMonitor(&qmp_, process_, deadline); !s.ok()) {
    return absl::IsUnavailable(s) ? absl::OkStatus() : s;
  }
  absl::StatusOr<std::string> run_state = QueryRunState(*qmp_, deadline);
  if (!run_state.ok()) return run_state.status();
  if (*run_state != "running") return absl::OkStatus();
  if (absl::Status s = qmp_->Execute("stop", nullptr, deadline).status(); !s.ok()) return s;
  return absl::AbortedError(
      "libvirt let it go on here although it may run on the target: it was stopped again");
}

absl::Status LibvirtSourceGuest::Quit(absl::Time deadline) {
  listener_.reset();
  ::unlink(options_.stream_path.c_str());
  const absl::Time libvirts_turn = std::min(deadline, MonotonicNow() + kLibvirtsTurn);
  bool ran = false;
  while (!ran && MonotonicNow() < libvirts_turn &&
         !process_.AwaitEnd(MonotonicNow() + kLookAgain).ok()) {
    ran = absl::IsAborted(HoldStill(deadline));
  }
  DropStream();
  expected_until_ = absl::InfinitePast();
  if (process_.HasEnded()) return absl::OkStatus();
  absl::Status destroyed = libvirt_.Destroy(options_.uuid);
  if (destroyed.ok()) return process_.AwaitEnd(deadline);
  // Without libvirt: it runs elsewhere, so this process has no use any more.
  return EndProcess(*qmp_, process_, deadline);
}

absl::StatusOr<RequestLook> LibvirtSourceGuest::LookAtRequests(absl::Time deadline) {
  if (absl::Status s = ReviveMonitor(&qmp_, process_, deadline); !s.ok()) return s;
  return requests_.Look(*qmp_, deadline);
}

absl::StatusOr<RunState> LibvirtSourceGuest::State(absl::Time deadline) {
  absl::Status revived = ReviveMonitor(&qmp_, process_, deadline);
  if (absl::IsUnavailable(revived)) return RunState::kGone;
  if (!revived.ok()) return revived;
  return QueryGuestState(*qmp_, process_, deadline);
}

GuestOutlook LibvirtSourceGuest::Look(absl::Time deadline) {
  GuestOutlook outlook = LookThrough(&qmp_, process_, &watch_, deadline);
  // libvirt makes the target's QEMU, of the same domain, when it comes to a launch: there is
  // nothing to compare with before.
  outlook.shape.clear();
  return outlook;
}

}  // namespace presync
