#include "qemu-glue/libvirt/libvirt_target_guest.h"

#include <errno.h>
#include <poll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "qemu-glue/libvirt/libvirt_client.h"
#include "qemu-glue/libvirt/unix_socket.h"
#include "qemu-glue/qemu_guest_calls.h"
#include "transport/clock.h"

namespace presync {
namespace {

constexpr size_t kBufferBytes = 64 << 10;
constexpr absl::Duration kLookAgain = absl::Microseconds(300);  // the guest stands still
// How long a QEMU whose stream broke may take to end by itself, or libvirt to end it.
constexpr absl::Duration kLibvirtsTurn = absl::Seconds(5);
// How long libvirt may take from the source's QEMU having heard to the target's running: some
// milliseconds, or its two daemons do not reach each other.
constexpr absl::Duration kLibvirtRuns = absl::Seconds(8);

absl::Status Gone() {
  return absl::UnavailableError(
      "the QEMU that libvirt started here does not take its device state: it has ended, its log "
      "(/var/log/libvirt/qemu) says why");
}

}  // namespace

HeldBackStream::HeldBackStream(UniqueFd from, UniqueFd to, ReturnBytes on_return)
    : from_(std::move(from)),
      to_(std::move(to)),
      cancel_(::eventfd(0, EFD_CLOEXEC)),
      on_return_(std::move(on_return)),
      back_([this] { PassBack(); }),
      thread_([this] {
        status_ = Pass();
        passed_ = true;
      }) {}

HeldBackStream::~HeldBackStream() {
  const uint64_t one = 1;
  (void)!::write(cancel_.get(), &one, sizeof(one));
  ::shutdown(to_.get(), SHUT_RDWR);  // wakes a write that nobody reads, and the reader
  if (thread_.joinable()) thread_.join();
  if (back_.joinable()) back_.join();
}

void HeldBackStream::PassBack() {
  char buffer[4096];
  while (true) {
    const ssize_t n = ::recv(to_.get(), buffer, sizeof(buffer), 0);
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0) return;
    on_return_({buffer, static_cast<size_t>(n)});
  }
}

absl::Status HeldBackStream::Pass() {
  std::vector<char> buffer(1 + kBufferBytes);
  while (true) {
    pollfd p[2] = {{.fd = from_.get(), .events = POLLIN, .revents = 0},
                   {.fd = cancel_.get(), .events = POLLIN, .revents = 0}};
    if (::poll(p, 2, -1) < 0 && errno != EINTR) {
      return absl::InternalError(absl::StrCat("poll: ", std::strerror(errno)));
    }
    if (p[1].revents != 0) return absl::CancelledError("the device state is not wanted any more");
    if (p[0].revents == 0) continue;
    const size_t held = last_.has_value() ? 1 : 0;
    if (held > 0) buffer[0] = *last_;
    const ssize_t n = ::read(from_.get(), buffer.data() + held, kBufferBytes);
    if (n < 0 && (errno == EINTR || errno == EAGAIN)) continue;
    if (n < 0) return absl::UnavailableError(absl::StrCat("device state: ", std::strerror(errno)));
    if (n == 0) return absl::OkStatus();
    const size_t size = held + static_cast<size_t>(n) - 1;
    last_ = buffer[size];
    if (!WriteToSocket(to_.get(), {buffer.data(), size})) return Gone();
  }
}

absl::Status HeldBackStream::AwaitPassed(absl::Time deadline) {
  while (!passed_) {
    if (MonotonicNow() >= deadline) {
      return absl::DeadlineExceededError("QEMU does not take its device state in time");
    }
    absl::SleepFor(kLookAgain);
  }
  if (!status_.ok()) return status_;
  if (!last_.has_value()) return absl::FailedPreconditionError("the device state is empty");
  bool gone = false;
  while (!HasReadAll(to_.get(), &gone)) {
    if (gone) return Gone();
    if (MonotonicNow() >= deadline) {
      return absl::DeadlineExceededError("QEMU does not read its device state");
    }
    absl::SleepFor(kLookAgain);
  }
  return absl::OkStatus();
}

absl::Status HeldBackStream::Release() {
  return WriteToSocket(to_.get(), {&*last_, 1}) ? absl::OkStatus() : Gone();
}

absl::StatusOr<std::unique_ptr<LibvirtTargetGuest>> LibvirtTargetGuest::Create(
    std::unique_ptr<QmpClient> qmp, std::string uri, std::string uuid, std::string stream_path,
    absl::Time deadline) {
  absl::StatusOr<PeerProcess> process = PeerProcess::Identify(*qmp, deadline);
  if (!process.ok()) return process.status();
  return std::unique_ptr<LibvirtTargetGuest>(
      new LibvirtTargetGuest(std::move(qmp), *std::move(process), std::move(uri), std::move(uuid),
                             std::move(stream_path)));
}

absl::Status LibvirtTargetGuest::SetIgnoreShared(bool on, absl::Time deadline) {
  const Json capability = {{"capability", "x-ignore-shared"}, {"state", on}};
  return qmp_
      ->Execute("migrate-set-capabilities", {{"capabilities", Json::array({capability})}}, deadline)
      .status();
}

// QEMU refuses a stream without RAM unless the capability is on, and one with RAM if it is: so a
// migration that goes another way than through presync never loads half a guest.
absl::StatusOr<UniqueFd> LibvirtTargetGuest::BeginLoad(absl::Time deadline) {
  if (stream_ != nullptr) {
    return absl::FailedPreconditionError("begin to load the guest: already begun");
  }
  absl::StatusOr<UniqueFd> qemu = ConnectUnix(stream_path_, deadline);
  if (!qemu.ok()) return qemu.status();
  if (!IsFromQemu(qemu->get(), process_)) {
    return absl::FailedPreconditionError(
        absl::StrCat("at ", stream_path_, " listens another process than the QEMU that waits"));
  }
  if (absl::Status s = SetIgnoreShared(true, deadline); !s.ok()) return s;
  int ends[2];
  if (::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends) != 0) {
    return absl::ResourceExhaustedError(
        absl::StrCat("socketpair for the device state: ", std::strerror(errno)));
  }
  stream_ = std::make_unique<HeldBackStream>(UniqueFd(ends[1]), *std::move(qemu), on_return_);
  return UniqueFd(ends[0]);
}

// QEMU loads in the thread that answers its monitor: an answer after it has read all says that it
// has loaded all, and waits for the last byte.
absl::Status LibvirtTargetGuest::AwaitLoaded(absl::Time deadline) {
  if (stream_ == nullptr) return absl::FailedPreconditionError("no device state came");
  if (absl::Status s = stream_->AwaitPassed(deadline); !s.ok()) return s;
  // From here on a `virsh save` of the guest must find its RAM.
  if (absl::Status s = SetIgnoreShared(false, deadline); !s.ok()) {
    return absl::IsUnavailable(s) ? Gone() : s;
  }
  absl::StatusOr<std::string> run_state = QueryRunState(*qmp_, deadline);
  if (!run_state.ok()) return absl::IsUnavailable(run_state.status()) ? Gone() : run_state.status();
  if (*run_state == "inmigrate") return absl::OkStatus();
  return absl::InternalError(absl::StrCat(
      "THE TARGET GUEST IS '", *run_state, "' although its last byte was kept back (QEMU process ",
      process_.pid(), "): stop it at once, the source may run too"));
}

// Whether QEMU has said that it runs the guest, if only for a moment.
bool LibvirtTargetGuest::HasRun() {
  has_run_ = has_run_ || qmp_->WaitEvent("RESUME", MonotonicNow()).ok();
  return has_run_;
}

// libvirt says `cont` when the source's QEMU has heard that all is loaded. When that does not come
// it never will, for the source has lost us: then this QEMU is ended, so that it is certain.
absl::Status LibvirtTargetGuest::Run(absl::Time deadline) {
  if (absl::Status s = stream_->Release(); !s.ok()) {
    return absl::FailedPreconditionError(s.message());  // without it QEMU can't have run anything
  }
  const absl::StatusOr<QmpEvent> resumed =
      qmp_->WaitEvent("RESUME", std::min(deadline, MonotonicNow() + kLibvirtRuns));
  if (resumed.ok()) return absl::OkStatus();
  if (absl::IsDeadlineExceeded(resumed.status())) {
    absl::Status ended = Discard(deadline);
    if (!ended.ok() || HasRun()) return ended.ok() ? resumed.status() : ended;
    return absl::FailedPreconditionError("libvirt did not run it in time: it was ended");
  }
  if (absl::IsUnavailable(resumed.status()) && process_.AwaitEnd(deadline).ok()) {
    return absl::FailedPreconditionError(
        absl::StrCat("QEMU (process ", process_.pid(),
                     ") ended before libvirt ran the guest; its log (/var/log/libvirt/qemu) and "
                     "libvirt's say why"));
  }
  return resumed.status();
}

absl::Status LibvirtTargetGuest::Discard(absl::Time deadline) {
  stream_.reset();
  const absl::Time libvirts_turn = std::min(deadline, MonotonicNow() + kLibvirtsTurn);
  if (process_.AwaitEnd(libvirts_turn).ok()) return absl::OkStatus();
  if (LibvirtClient(uri_).Destroy(uuid_).ok()) return process_.AwaitEnd(deadline);
  return EndProcess(*qmp_, process_, deadline);
}

absl::StatusOr<RunState> LibvirtTargetGuest::State(absl::Time deadline) {
  return QueryGuestState(*qmp_, process_, deadline);
}

}  // namespace presync
