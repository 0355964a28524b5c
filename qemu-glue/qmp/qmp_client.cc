#include "qemu-glue/qmp/qmp_client.h"

#include <fcntl.h>
#include <sys/socket.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstring>
#include <utility>

#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "qemu-glue/qmp/wait.h"
#include "transport/clock.h"
#include "transport/json.h"
#include "transport/printable.h"
#include "transport/unix_address.h"

namespace presync {
namespace {

std::string ErrnoText(int error) { return std::strerror(error); }  // NOLINT(concurrency-mt-unsafe)

absl::Status ConnectError(const std::string& path, int error) {
  std::string what = absl::StrCat("QMP: connect to ", path, ": ", ErrnoText(error));
  switch (error) {
    case ENOENT:
      return absl::NotFoundError(
          absl::StrCat(what, "; start QEMU with -qmp unix:", path, ",server=on,wait=off"));
    case ECONNREFUSED:
      return absl::UnavailableError(
          absl::StrCat(what, "; a QEMU that has ended left the socket behind, or it is no socket"));
    case EACCES:
    case EPERM:
      return absl::PermissionDeniedError(what);
    default:
      return absl::UnavailableError(what);
  }
}

// A listening socket whose queue is full says EAGAIN instead of waiting: others queue there
// already.
constexpr absl::Duration kRetryConnect = absl::Milliseconds(10);

// What has come is read even after the deadline, but not for ever: a QEMU that sends events faster
// than they are read would keep its reader.
absl::Time GiveUpAt(absl::Time deadline) {
  return std::max(deadline, MonotonicNow()) + absl::Seconds(1);
}

absl::StatusOr<UniqueFd> OpenSocket(const std::string& path, absl::Time deadline) {
  const absl::StatusOr<sockaddr_un> address = UnixAddress(path);
  if (!address.ok()) {
    return absl::InvalidArgumentError(absl::StrCat("QMP: ", address.status().message()));
  }
  UniqueFd fd(::socket(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0));
  if (!fd.valid()) {
    return absl::ResourceExhaustedError(absl::StrCat("QMP: socket: ", ErrnoText(errno)));
  }
  while (::connect(fd.get(), Raw(*address), sizeof(*address)) != 0) {
    if (errno == EINTR) continue;
    if (errno != EAGAIN) return ConnectError(path, errno);
    if (MonotonicNow() >= deadline) {
      return absl::DeadlineExceededError(
          absl::StrCat("QMP: connect to ", path,
                       ": other clients are waiting for this monitor already, and QEMU serves one "
                       "at a time; give "
                       "presync a monitor of its own"));
    }
    absl::SleepFor(kRetryConnect);
  }
  return fd;
}

// What came instead of QMP, short enough for an error text.
std::string Excerpt(const std::string& received) {
  return absl::StrCat("\"", absl::CHexEscape(received.substr(0, 60)), "\"");
}

ssize_t SendSome(int socket, const char* data, size_t size, int fd_to_pass) {
  iovec part = {const_cast<char*>(data), size};
  msghdr message = {};
  message.msg_iov = &part;
  message.msg_iovlen = 1;
  alignas(cmsghdr) std::array<char, CMSG_SPACE(sizeof(int))> control = {};
  if (fd_to_pass >= 0) {
    message.msg_control = control.data();
    message.msg_controllen = control.size();
    cmsghdr* header = CMSG_FIRSTHDR(&message);
    header->cmsg_level = SOL_SOCKET;
    header->cmsg_type = SCM_RIGHTS;
    header->cmsg_len = CMSG_LEN(sizeof(int));
    std::memcpy(CMSG_DATA(header), &fd_to_pass, sizeof(int));
  }
  return ::sendmsg(socket, &message, MSG_NOSIGNAL);
}

absl::Time EventTime(const Json& message) {
  const Json* time = FindMember(message, "timestamp");
  const std::optional<uint64_t> seconds = time ? UintAt(*time, "seconds") : std::nullopt;
  if (!seconds) return MonotonicNow();
  return FromWallTime(absl::FromUnixSeconds(static_cast<int64_t>(*seconds)) +
                      absl::Microseconds(UintAt(*time, "microseconds").value_or(0)));
}

// What QEMU sends to a client that has been greeted.
bool IsForAnother(const Json& message) {
  return message.is_object() &&
         (FindMember(message, "event") != nullptr || FindMember(message, "id") != nullptr);
}

}  // namespace

absl::StatusOr<std::unique_ptr<QmpClient>> QmpClient::Connect(const std::string& path,
                                                              absl::Time deadline) {
  absl::StatusOr<UniqueFd> socket = OpenSocket(path, deadline);
  if (!socket.ok()) return socket.status();
  std::unique_ptr<QmpClient> client(new QmpClient(path, *std::move(socket)));
  client->peer_ = PeerOf(client->socket_.get());
  if (absl::Status status = client->Negotiate(deadline); !status.ok()) return status;
  return client;
}

absl::Status QmpClient::Negotiate(absl::Time deadline) {
  if (absl::Status status = ReadGreeting(deadline); !status.ok()) return status;
  return Execute("qmp_capabilities", nullptr, deadline).status();
}

absl::Status QmpClient::ReadGreeting(absl::Time deadline) {
  absl::StatusOr<std::string> line;
  Json greeting;
  // QEMU may still send events, or answers, that were for the monitor's last client: it notices
  // that there is a new one a moment after that is connected.
  const absl::Time give_up_at = GiveUpAt(deadline);
  do {
    line = ReadLine(deadline);
    if (line.ok() && MonotonicNow() > give_up_at) {
      return absl::DeadlineExceededError(
          absl::StrCat("QMP: ", path_, " sends other things than a greeting, without end"));
    }
    if (absl::IsDeadlineExceeded(line.status()) && received_.empty()) {
      return absl::DeadlineExceededError(absl::StrCat(
          "QMP: ", path_,
          " took the connection but sent no greeting: another client is using this monitor (QEMU "
          "serves one at a time; give presync a monitor of its own), QEMU is stopped, or this does "
          "not speak QMP"));
    }
    if (absl::IsDeadlineExceeded(line.status())) {
      return absl::InvalidArgumentError(
          absl::StrCat("QMP: ", path_, " does not speak QMP: it sent ", Excerpt(received_)));
    }
    if (!line.ok()) return line.status();
    greeting = ParseJson(*line);
  } while (IsForAnother(greeting));
  const Json* qmp = FindMember(greeting, "QMP");
  const Json* version = qmp == nullptr ? nullptr : FindMember(*qmp, "version");
  const Json* qemu = version == nullptr ? nullptr : FindMember(*version, "qemu");
  if (qemu == nullptr || !UintAt(*qemu, "major").has_value()) {
    return absl::InvalidArgumentError(
        absl::StrCat("QMP: ", path_, " does not speak QMP: it sent ", Excerpt(*line),
                     " (a human monitor answers like this too; it needs mode=control, or -qmp)"));
  }
  version_ = {*UintAt(*qemu, "major"), UintAt(*qemu, "minor").value_or(0),
              UintAt(*qemu, "micro").value_or(0)};
  return absl::OkStatus();
}

absl::StatusOr<Json> QmpClient::Execute(const std::string& command, const Json& arguments,
                                        absl::Time deadline, int fd_to_pass) {
  absl::StatusOr<uint64_t> id = SendCommand(command, arguments, deadline, fd_to_pass);
  if (!id.ok()) return id.status();
  absl::StatusOr<std::optional<Json>> result = AwaitReply(*id, command, /*or_event=*/"", deadline);
  if (!result.ok()) return result.status();
  return **std::move(result);
}

absl::StatusOr<bool> QmpClient::ExecuteUntil(const std::string& command, const Json& arguments,
                                             std::string_view event, absl::Time deadline) {
  DropEvents(event);
  absl::StatusOr<uint64_t> id = SendCommand(command, arguments, deadline, -1);
  if (!id.ok()) return id.status();
  absl::StatusOr<std::optional<Json>> result = AwaitReply(*id, command, event, deadline);
  if (!result.ok()) return result.status();
  return !result->has_value();
}

absl::StatusOr<std::vector<Json>> QmpClient::ExecuteAll(absl::Span<const QmpCommand> commands,
                                                        absl::Time deadline) {
  std::vector<uint64_t> ids;
  for (const QmpCommand& command : commands) {
    absl::StatusOr<uint64_t> id =
        SendCommand(command.name, command.arguments, deadline, command.fd_to_pass);
    if (!id.ok()) return id.status();
    ids.push_back(*id);
  }
  std::vector<Json> results;
  for (size_t i = 0; i < ids.size(); ++i) {
    absl::StatusOr<std::optional<Json>> result =
        AwaitReply(ids[i], commands[i].name, /*or_event=*/"", deadline);
    if (!result.ok()) return result.status();
    results.push_back(**std::move(result));
  }
  return results;
}

// The result of command `id`; nothing if `or_event` came first.
absl::StatusOr<std::optional<Json>> QmpClient::AwaitReply(uint64_t id, const std::string& command,
                                                          std::string_view or_event,
                                                          absl::Time deadline) {
  const absl::Time give_up_at = GiveUpAt(deadline);
  while (true) {
    absl::StatusOr<Json> message = ReadMessage(deadline);
    if (absl::IsDeadlineExceeded(message.status()) ||
        (message.ok() && MonotonicNow() > give_up_at)) {
      return absl::DeadlineExceededError(absl::StrCat("QMP: ", path_, ": no answer to '", command,
                                                      "' in time; QEMU is busy or stopped"));
    }
    if (!message.ok()) return message.status();
    if (!or_event.empty() && StringAt(*message, "event") == or_event) return std::nullopt;
    const Json* error = FindMember(*message, "error");
    // Another id belongs to a command that was given up, or posted. Only an error may lack it.
    if (FindMember(*message, "id") == nullptr ? error == nullptr : UintAt(*message, "id") != id) {
      continue;
    }
    if (error != nullptr) {
      return absl::FailedPreconditionError(
          absl::StrCat("QEMU refused '", command, "': ", PrintableText(StringAt(*error, "desc")),
                       " (", PrintableText(StringAt(*error, "class")), ")"));
    }
    if (const Json* result = FindMember(*message, "return")) return std::optional<Json>(*result);
    return Break(absl::InvalidArgumentError(absl::StrCat(
        "QMP: ", path_, ": the answer to '", command, "' is neither result nor error")));
  }
}

absl::Status QmpClient::Post(const std::string& command, const Json& arguments,
                             absl::Time deadline) {
  return SendCommand(command, arguments, deadline, -1).status();
}

absl::StatusOr<QmpEvent> QmpClient::WaitEvent(absl::FunctionRef<bool(const QmpEvent&)> matches,
                                              absl::Time deadline) {
  const absl::Time give_up_at = GiveUpAt(deadline);
  size_t seen = 0;
  while (true) {
    for (; seen < events_.size(); ++seen) {
      if (!matches(events_[seen])) continue;
      QmpEvent event = std::move(events_[seen]);
      events_.erase(events_.begin() + static_cast<std::ptrdiff_t>(seen));
      return event;
    }
    if (!broken_.ok()) return broken_;
    absl::StatusOr<Json> message = ReadMessage(deadline);
    if (absl::IsDeadlineExceeded(message.status()) ||
        (message.ok() && MonotonicNow() > give_up_at)) {
      return absl::DeadlineExceededError(absl::StrCat("QMP: ", path_, ": no such event in time"));
    }
    if (!message.ok()) return message.status();
    if (events_.size() >= kMaxEvents) seen = kMaxEvents - 1;  // the oldest made room for a new one
  }
}

absl::StatusOr<QmpEvent> QmpClient::WaitEvent(const std::string& name, absl::Time deadline) {
  return WaitEvent([&name](const QmpEvent& event) { return event.name == name; }, deadline);
}

std::vector<QmpEvent> QmpClient::TakeEvents(const std::string& name) {
  std::vector<QmpEvent> taken;
  while (taken.size() < kMaxEvents) {
    absl::StatusOr<QmpEvent> event = WaitEvent(name, MonotonicNow());
    if (!event.ok()) break;
    taken.push_back(*std::move(event));
  }
  return taken;
}

void QmpClient::DropEvents(std::string_view name) {
  std::erase_if(events_, [name](const QmpEvent& event) { return event.name == name; });
}

absl::StatusOr<uint64_t> QmpClient::SendCommand(const std::string& command, const Json& arguments,
                                                absl::Time deadline, int fd_to_pass) {
  if (!broken_.ok()) return broken_;
  const uint64_t id = next_id_++;
  Json message = {{"execute", command}, {"id", id}};
  if (!arguments.is_null()) message["arguments"] = arguments;
  absl::Status status = Send(ToText(message) + "\n", deadline, fd_to_pass);
  if (!status.ok()) return status;
  return id;
}

absl::Status QmpClient::Send(const std::string& line, absl::Time deadline, int fd_to_pass) {
  size_t sent = 0;
  while (sent < line.size()) {
    ssize_t count = SendSome(socket_.get(), line.data() + sent, line.size() - sent, fd_to_pass);
    if (count > 0) {
      sent += static_cast<size_t>(count);
      fd_to_pass = -1;
      continue;
    }
    if (errno == EINTR) continue;
    if (errno == EBADF)
      return absl::InvalidArgumentError("QMP: the descriptor to pass is not open");
    if (errno != EAGAIN) {
      command_unread_ = true;
      return Break(absl::UnavailableError(absl::StrCat(
          "QMP: ", path_, ": QEMU closed the monitor (", ErrnoText(errno), "); it has ended")));
    }
    if (WaitReady(socket_.get(), POLLOUT, deadline)) continue;
    absl::Status late = absl::DeadlineExceededError(
        absl::StrCat("QMP: ", path_, ": QEMU takes no commands; it is busy or stopped"));
    // A line cut in two would be read together with the next one.
    return sent == 0 ? late : Break(late);
  }
  return absl::OkStatus();
}

absl::StatusOr<Json> QmpClient::ReadMessage(absl::Time deadline) {
  absl::StatusOr<std::string> line = ReadLine(deadline);
  if (!line.ok()) return line.status();
  Json message = ParseJson(*line);
  if (!message.is_object()) {
    return Break(absl::InvalidArgumentError(
        absl::StrCat("QMP: ", path_, " broke the protocol: it sent ", Excerpt(*line))));
  }
  if (FindMember(message, "event") != nullptr && line->size() <= kMaxEventBytes) {
    KeepEvent(message);
  }
  return message;
}

absl::StatusOr<std::string> QmpClient::ReadLine(absl::Time deadline) {
  if (!broken_.ok()) return broken_;
  std::array<char, 65536> chunk;
  while (true) {
    const size_t end = received_.find('\n', searched_bytes_);
    if (end != std::string::npos) {
      std::string line = received_.substr(0, end);
      received_.erase(0, end + 1);
      searched_bytes_ = 0;
      return line;
    }
    searched_bytes_ = received_.size();
    if (received_.size() > kMaxLineBytes) {
      return Break(absl::InvalidArgumentError(absl::StrCat(
          "QMP: ", path_, " broke the protocol: a line of more than ", kMaxLineBytes, " bytes")));
    }
    const ssize_t count = ::recv(socket_.get(), chunk.data(), chunk.size(), 0);
    if (count > 0) {
      received_.append(chunk.data(), static_cast<size_t>(count));
    } else if (count == 0) {
      return Break(absl::UnavailableError(
          absl::StrCat("QMP: ", path_, ": QEMU closed the monitor; it has ended")));
    } else if (errno == EAGAIN) {
      if (!WaitReady(socket_.get(), POLLIN, deadline)) {
        return absl::DeadlineExceededError(absl::StrCat("QMP: ", path_, ": nothing came in time"));
      }
    } else if (errno != EINTR) {
      command_unread_ = errno == ECONNRESET;
      return Break(absl::UnavailableError(
          absl::StrCat("QMP: ", path_, ": read: ", ErrnoText(errno), "; QEMU has ended")));
    }
  }
}

void QmpClient::KeepEvent(const Json& message) {
  if (events_.size() >= kMaxEvents) events_.pop_front();
  const Json* data = FindMember(message, "data");
  events_.push_back(
      {StringAt(message, "event"), data == nullptr ? Json() : *data, EventTime(message)});
}

absl::Status QmpClient::Break(absl::Status why) {
  broken_ = std::move(why);
  socket_.reset();
  return broken_;
}

}  // namespace presync
