#include "qemu-glue/dirty_log/glue_client.h"

#include <fcntl.h>
#include <poll.h>
#include <sys/socket.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "qemu-glue/socket_peer.h"
#include "transport/clock.h"
#include "transport/unix_address.h"

namespace presync {
namespace {

constexpr char kHowToLoad[] =
    "start QEMU with -plugin presync_glue.so,socket=PATH, or, if it was built without plug-ins, "
    "with "
    "LD_PRELOAD=presync_glue.so and PRESYNC_GLUE_SOCKET=PATH in its environment";

std::string ErrnoText(int error) { return std::strerror(error); }

presync_glue_request NewRequest(presync_glue_type type) {
  presync_glue_request request = {};
  request.magic = PRESYNC_GLUE_MAGIC;
  request.version = PRESYNC_GLUE_VERSION;
  request.type = static_cast<uint16_t>(type);
  request.length = sizeof(request);
  return request;
}

absl::Status WaitFor(int socket, short events, const std::string& path, absl::Time deadline) {
  while (true) {
    const int64_t left_ms = absl::ToInt64Milliseconds(deadline - MonotonicNow());
    pollfd entry = {socket, events, 0};
    const int ready =
        ::poll(&entry, 1, static_cast<int>(std::clamp<int64_t>(left_ms, 0, 3'600'000)));
    if (ready > 0) return absl::OkStatus();
    if (ready < 0 && errno != EINTR) return absl::ErrnoToStatus(errno, "poll on the glue socket");
    if (MonotonicNow() >= deadline) {
      return absl::DeadlineExceededError(
          absl::StrCat("the library inside QEMU at ", path, " did not answer in time"));
    }
  }
}

absl::Status ConnectError(int error, const std::string& path) {
  switch (error) {
    case ENOENT:
      return absl::NotFoundError(
          absl::StrCat("nothing is at the glue socket ", path, ": ", kHowToLoad));
    case ECONNREFUSED:
      return absl::NotFoundError(absl::StrCat("nobody listens at the glue socket ", path,
                                              " any more, its QEMU is gone: ", kHowToLoad));
    case EACCES:
    case EPERM:
      return absl::PermissionDeniedError(absl::StrCat("connecting to the glue socket ", path, ": ",
                                                      ErrnoText(error),
                                                      ": run presyncd as root or as QEMU's user"));
    case EPROTOTYPE:
      return absl::InvalidArgumentError(
          absl::StrCat(path, " is a socket of another kind, not the one of presync_glue.so"));
    default:
      return absl::ErrnoToStatus(error, absl::StrCat("connecting to the glue socket ", path));
  }
}

// A full backlog makes connect(2) say EAGAIN; there is nothing to poll for, so look again after a
// while.
absl::Status ConnectSocket(int socket, const std::string& path, absl::Time deadline) {
  const absl::StatusOr<sockaddr_un> address = UnixAddress(path);
  if (!address.ok()) return address.status();
  while (::connect(socket, Raw(*address), sizeof(*address)) != 0) {
    if (errno != EAGAIN && errno != EINTR) return ConnectError(errno, path);
    if (MonotonicNow() >= deadline) {
      return absl::DeadlineExceededError(
          absl::StrCat("the library inside QEMU at ", path, " does not accept connections"));
    }
    absl::SleepFor(absl::Milliseconds(2));
  }
  return absl::OkStatus();
}

// The peer is held: if it lives after its number was looked at, the number is its own.
absl::Status CheckPeer(int socket, const std::string& path, const ProcessIdentity& qemu) {
  const absl::StatusOr<SocketPeer> peer = PeerOf(socket);
  if (!peer.ok()) {
    return absl::FailedPreconditionError(absl::StrCat("who listens at the glue socket ", path,
                                                      " can't be told: ", peer.status().message()));
  }
  pollfd ended = {peer->pidfd.get(), POLLIN, 0};
  const bool same = peer->pid == qemu.pid && StartTicks(peer->pid) == qemu.start_ticks;
  if (same && ::poll(&ended, 1, 0) == 0) return absl::OkStatus();
  return absl::FailedPreconditionError(absl::StrCat(
      "at the glue socket ", path, " listens process ", peer->pid, ", not this guest's QEMU (",
      qemu.pid, "): name the socket of the plug-in that this very QEMU has loaded"));
}

absl::Status RegisterError(int error) {
  if (error == EBUSY) {
    return absl::FailedPreconditionError(
        "registering guest RAM with userfaultfd: EBUSY: another userfaultfd of this QEMU is on it, "
        "as a "
        "background snapshot or a post-copy migration makes: let it finish or cancel it first");
  }
  if (error == EINVAL) {
    return absl::UnimplementedError(
        "registering guest RAM with userfaultfd: EINVAL: this kernel can't write-protect memory of "
        "that "
        "kind: guest RAM must be on tmpfs or a memfd, and Linux 5.19 or newer");
  }
  return absl::InternalError(
      absl::StrCat("registering guest RAM with userfaultfd: ", ErrnoText(error)));
}

absl::Status OpenError(int error) {
  if (error == EPERM) {
    return absl::PermissionDeniedError(
        "QEMU may not use userfaultfd (EPERM): run presyncd as root, so that it can open "
        "/dev/userfaultfd for QEMU (Linux 6.1), or set sysctl vm.unprivileged_userfaultfd=1");
  }
  if (error == ENOSYS) {
    return absl::UnimplementedError("the kernel was built without userfaultfd");
  }
  return absl::InternalError(absl::StrCat("making a userfaultfd in QEMU: ", ErrnoText(error)));
}

absl::Status RequestError(int error) {
  switch (error) {
    case EEXIST:
      return absl::FailedPreconditionError(
          "QEMU's memory is tracked already in another way (mode or range): untrack it first");
    case ENOSPC:
      return absl::ResourceExhaustedError(absl::StrCat("the library inside QEMU tracks ",
                                                       PRESYNC_GLUE_MAX_RANGES, " ranges already"));
    case ENOENT:
      return absl::FailedPreconditionError("the library inside QEMU tracks no such range");
    default:
      return absl::InternalError(
          absl::StrCat("the library inside QEMU refused the request: ", ErrnoText(error)));
  }
}

absl::Status ReplyError(const presync_glue_reply& reply, const std::string& path) {
  const int error = reply.error;
  switch (reply.step) {
    case PRESYNC_GLUE_STEP_BUSY:
      return absl::FailedPreconditionError(
          absl::StrCat("another presyncd is connected to the glue socket ", path));
    case PRESYNC_GLUE_STEP_REQUEST:
      return RequestError(error);
    case PRESYNC_GLUE_STEP_MAPS:
      return absl::FailedPreconditionError(
          absl::StrCat("the range is not all shared, writable memory of QEMU: ", ErrnoText(error)));
    case PRESYNC_GLUE_STEP_OPEN:
      return OpenError(error);
    case PRESYNC_GLUE_STEP_API:
      return absl::UnimplementedError(
          absl::StrCat("the kernel's userfaultfd lacks the features of this mode (",
                       ErrnoText(error), "): uffd-async needs Linux 6.7, uffd-handler 5.19"));
    case PRESYNC_GLUE_STEP_REGISTER:
      return RegisterError(error);
    case PRESYNC_GLUE_STEP_BITMAP:
    case PRESYNC_GLUE_STEP_THREAD:
      return absl::ResourceExhaustedError(
          absl::StrCat("memory or threads for tracking inside QEMU: ", ErrnoText(error)));
    default:
      return absl::InternalError(absl::StrCat("the library inside QEMU failed at step ", reply.step,
                                              ": ", ErrnoText(error)));
  }
}

// Calls on it are made with rights that QEMU lacks, so it must be what it is said to be. No file's
// name begins like that.
bool IsUserfaultfd(int fd) {
  char name[64] = {};
  const ssize_t length =
      ::readlink(absl::StrCat("/proc/self/fd/", fd).c_str(), name, sizeof(name) - 1);
  return length > 0 && absl::string_view(name) == "anon_inode:[userfaultfd]";
}

// Moves the descriptors of a message into received[0..1]; returns how many there were. More are
// closed.
uint32_t TakeDescriptors(msghdr* message, UniqueFd received[2]) {
  uint32_t count = 0;
  for (cmsghdr* c = CMSG_FIRSTHDR(message); c != nullptr; c = CMSG_NXTHDR(message, c)) {
    if (c->cmsg_level != SOL_SOCKET || c->cmsg_type != SCM_RIGHTS) continue;
    const size_t fds = (c->cmsg_len - CMSG_LEN(0)) / sizeof(int);
    for (size_t i = 0; i < fds; ++i) {
      int fd = -1;
      std::memcpy(&fd, CMSG_DATA(c) + i * sizeof(int), sizeof(fd));
      UniqueFd owned(fd);
      if (count < 2) received[count] = std::move(owned);
      ++count;
    }
  }
  return count;
}

// The errno of a send, 0 if it went out.
int SendRequest(int socket, const presync_glue_request& request, int fd) {
  iovec data = {const_cast<presync_glue_request*>(&request), sizeof(request)};
  alignas(cmsghdr) char control[CMSG_SPACE(sizeof(int))] = {};
  msghdr message = {};
  message.msg_iov = &data;
  message.msg_iovlen = 1;
  if (fd >= 0) {
    message.msg_control = control;
    message.msg_controllen = sizeof(control);
    cmsghdr* c = CMSG_FIRSTHDR(&message);
    c->cmsg_level = SOL_SOCKET;
    c->cmsg_type = SCM_RIGHTS;
    c->cmsg_len = CMSG_LEN(sizeof(int));
    std::memcpy(CMSG_DATA(c), &fd, sizeof(fd));
  }
  ssize_t sent;
  do {
    sent = ::sendmsg(socket, &message, MSG_NOSIGNAL | MSG_DONTWAIT);
  } while (sent < 0 && errno == EINTR);
  return sent == sizeof(request) ? 0 : sent < 0 ? errno : EMSGSIZE;
}

}  // namespace

absl::StatusOr<GlueClient> GlueClient::Connect(const std::string& path, const ProcessIdentity& qemu,
                                               absl::Time deadline) {
  GlueClient client;
  client.path_ = path;
  client.socket_.reset(::socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
  if (!client.socket_.valid()) return absl::ErrnoToStatus(errno, "making a socket");
  absl::Status connected = ConnectSocket(client.socket_.get(), path, deadline);
  if (!connected.ok()) return connected;
  if (absl::Status s = CheckPeer(client.socket_.get(), path, qemu); !s.ok()) return s;
  client.pid_ = qemu.pid;

  UniqueFd none[2];
  const absl::StatusOr<presync_glue_reply> hello =
      client.Receive(PRESYNC_GLUE_HELLO, none, deadline);
  if (!hello.ok()) return hello.status();
  if (hello->step == PRESYNC_GLUE_STEP_BUSY) return ReplyError(*hello, path);
  client.hello_ = *hello;
  return client;
}

absl::StatusOr<GlueRange> GlueClient::Track(uint64_t start, uint64_t bytes, GlueMode mode,
                                            absl::Time deadline) {
  presync_glue_request request = NewRequest(PRESYNC_GLUE_TRACK);
  request.mode = static_cast<uint32_t>(mode);
  request.start = start;
  request.bytes = bytes;
  absl::StatusOr<GlueRange> range = CallForRange(request, deadline);
  if (range.ok() && (range->start != start || range->bytes != bytes)) {
    return absl::InvalidArgumentError("the library inside QEMU answered for another range");
  }
  return range;
}

absl::StatusOr<GlueRange> GlueClient::MakeScratch(GlueMode mode, absl::Time deadline) {
  presync_glue_request request = NewRequest(PRESYNC_GLUE_SCRATCH);
  request.mode = static_cast<uint32_t>(mode);
  absl::StatusOr<GlueRange> range = CallForRange(request, deadline);
  if (range.ok() &&
      range->bytes != uint64_t{PRESYNC_GLUE_SCRATCH_PAGES} * PRESYNC_GLUE_PAGE_BYTES) {
    return absl::InvalidArgumentError("the library inside QEMU made trial memory of another size");
  }
  return range;
}

absl::StatusOr<GlueRange> GlueClient::CallForRange(const presync_glue_request& request,
                                                   absl::Time deadline) {
  // Only root can open it. It gives a userfaultfd that holds up writes of the kernel, too, which
  // can be used to attack it: so it is for the handler's log alone, which can't do without. Where
  // the kernel itself lifts the protection, one of user mode is enough, and QEMU gets that by
  // itself.
  UniqueFd device;
  if (request.mode == PRESYNC_GLUE_MODE_HANDLER) {
    device.reset(::open("/dev/userfaultfd", O_RDWR | O_CLOEXEC));
  }
  UniqueFd received[2];
  const absl::StatusOr<presync_glue_reply> reply = Call(request, device.get(), received, deadline);
  if (!reply.ok()) return reply.status();
  const uint32_t wanted = request.mode == PRESYNC_GLUE_MODE_HANDLER ? 2 : 1;
  if (reply->fds != wanted) {
    return absl::InvalidArgumentError(absl::StrCat("the library inside QEMU sent ", reply->fds,
                                                   " descriptors instead of ", wanted));
  }
  if (!IsUserfaultfd(received[0].get())) {
    return absl::InvalidArgumentError(
        "the library inside QEMU sent a descriptor that is no userfaultfd");
  }
  return GlueRange{reply->start, reply->bytes, std::move(received[0]), std::move(received[1])};
}

absl::Status GlueClient::Untrack(uint64_t start, uint64_t bytes, absl::Time deadline) {
  presync_glue_request request = NewRequest(PRESYNC_GLUE_UNTRACK);
  request.start = start;
  request.bytes = bytes;
  UniqueFd none[2];
  return Call(request, -1, none, deadline).status();
}

absl::Status GlueClient::WriteScratch(uint64_t address, absl::Time deadline) {
  presync_glue_request request = NewRequest(PRESYNC_GLUE_SCRATCH_WRITE);
  request.start = address;
  UniqueFd none[2];
  return Call(request, -1, none, deadline).status();
}

absl::Status GlueClient::DropScratch(absl::Time deadline) {
  UniqueFd none[2];
  return Call(NewRequest(PRESYNC_GLUE_SCRATCH_DROP), -1, none, deadline).status();
}

absl::Status GlueClient::Ping(absl::Time deadline) {
  UniqueFd none[2];
  // Whether QEMU may use userfaultfd by itself does not matter here.
  const absl::StatusOr<presync_glue_reply> reply =
      Call(NewRequest(PRESYNC_GLUE_STATUS), -1, none, deadline);
  return reply.status();
}

absl::StatusOr<presync_glue_reply> GlueClient::Call(const presync_glue_request& request,
                                                    int fd_to_send, UniqueFd received[2],
                                                    absl::Time deadline) {
  const int error = SendRequest(socket_.get(), request, fd_to_send);
  if (error != 0) {
    return absl::UnavailableError(
        absl::StrCat("asking the library inside QEMU at ", path_, ": ", ErrnoText(error)));
  }
  absl::StatusOr<presync_glue_reply> reply = Receive(request.type, received, deadline);
  if (reply.ok() && reply->error != 0 && request.type != PRESYNC_GLUE_STATUS) {
    return ReplyError(*reply, path_);
  }
  return reply;
}

absl::StatusOr<presync_glue_reply> GlueClient::Receive(uint16_t type, UniqueFd received[2],
                                                       absl::Time deadline) {
  presync_glue_reply reply = {};
  iovec data = {&reply, sizeof(reply)};
  alignas(cmsghdr) char control[CMSG_SPACE(2 * sizeof(int))] = {};
  msghdr message = {};
  ssize_t bytes;
  do {
    const absl::Status ready = WaitFor(socket_.get(), POLLIN, path_, deadline);
    if (!ready.ok()) return ready;
    message = {};
    message.msg_iov = &data;
    message.msg_iovlen = 1;
    message.msg_control = control;
    message.msg_controllen = sizeof(control);
    bytes = ::recvmsg(socket_.get(), &message, MSG_CMSG_CLOEXEC | MSG_DONTWAIT);
  } while (bytes < 0 && (errno == EINTR || errno == EAGAIN) && MonotonicNow() < deadline);
  // An empty packet, which looks like the end, may bring descriptors, too.
  const uint32_t fds = bytes < 0 ? 0 : TakeDescriptors(&message, received);
  if (bytes <= 0) {
    return absl::UnavailableError(absl::StrCat(
        "the library inside QEMU at ", path_, " hung up: ", bytes == 0 ? "end" : ErrnoText(errno)));
  }
  if (bytes != sizeof(reply) || (message.msg_flags & (MSG_TRUNC | MSG_CTRUNC)) != 0 ||
      reply.magic != PRESYNC_GLUE_MAGIC || reply.version != PRESYNC_GLUE_VERSION ||
      reply.type != type || reply.length != sizeof(reply) || reply.fds != fds) {
    return absl::InvalidArgumentError(
        absl::StrCat("what listens at ", path_, " does not speak version ", PRESYNC_GLUE_VERSION,
                     " of the glue protocol: install the presync_glue.so that came with presyncd "
                     "and restart QEMU"));
  }
  return reply;
}

}  // namespace presync
