// A client of QEMU's machine protocol (QMP: docs/interop/qmp-spec in QEMU's documentation).
//
// QEMU serves one client of a monitor at a time, so presync wants a monitor of its own beside the
// operator's (or libvirt's): `-qmp unix:PATH,server=on,wait=off` may stand there twice. presync
// keeps its connection for as long as it looks after the guest.
#pragma once

#include <sys/types.h>

#include <cstdint>
#include <deque>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "absl/functional/function_ref.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "absl/types/span.h"
#include "qemu-glue/qmp/json_read.h"
#include "qemu-glue/socket_peer.h"
#include "transport/unique_fd.h"

namespace presync {

struct QmpVersion {
  uint64_t major = 0;
  uint64_t minor = 0;
  uint64_t micro = 0;
};

struct QmpCommand {
  std::string name;
  Json arguments;       // an object or null
  int fd_to_pass = -1;  // if not negative it goes along, for `getfd`; it stays the caller's
};

struct QmpEvent {
  std::string name;  // "MIGRATION", "STOP", ...
  Json data;         // an object; null if the event has none
  absl::Time at;     // monotonic; made of QEMU's date, which may have been set: bound it
};

// One connection. One thread at a time may use it; it has no threads of its own. Calls block until
// their deadline.
//
// Once QEMU is gone, or has sent something that is no QMP, every later call returns that first
// error again. One that never ceases to send something else than what is waited for gets a second
// beyond the deadline.
class QmpClient {
 public:
  // Longest line taken from QEMU. The longest that presync asks for (`qom-list` of a large tree)
  // has some tens of kilobytes.
  static constexpr size_t kMaxLineBytes = size_t{8} << 20;
  // Events kept until someone waits for them; beyond that the oldest is dropped. An event whose
  // line is longer than any of QEMU's is dropped at once: parsed, it may take thirty times as much
  // memory.
  static constexpr size_t kMaxEvents = 256;
  static constexpr size_t kMaxEventBytes = 16384;

  // Connects, reads the greeting and negotiates capabilities. NOT_FOUND: no such socket.
  // PERMISSION_DENIED. INVALID_ARGUMENT: the path is too long for a socket, or what answers there
  // does not speak QMP. UNAVAILABLE: nobody listens there, or QEMU ended meanwhile.
  // DEADLINE_EXCEEDED: nothing came, which is what a monitor does that another client is using.
  static absl::StatusOr<std::unique_ptr<QmpClient>> Connect(const std::string& path,
                                                            absl::Time deadline);

  // Runs one command and returns its result (`return` of the reply). `arguments` is an object or
  // null. `fd_to_pass`, if not negative, goes along by SCM_RIGHTS (for `getfd`); it stays the
  // caller's. FAILED_PRECONDITION: QEMU refused; the text has its error class and words.
  // DEADLINE_EXCEEDED: no answer yet; the command may still take effect. UNAVAILABLE: QEMU is gone.
  // INVALID_ARGUMENT: QEMU broke the protocol.
  absl::StatusOr<Json> Execute(const std::string& command, const Json& arguments,
                               absl::Time deadline, int fd_to_pass = -1);

  // Runs one command and returns true as soon as `event` tells that it took effect, which may be
  // well before the reply (that is dropped then, when it comes); false: the reply came, and no such
  // event before it. Older events of this name are forgotten. Errors as Execute.
  absl::StatusOr<bool> ExecuteUntil(const std::string& command, const Json& arguments,
                                    std::string_view event, absl::Time deadline);

  // Runs several commands, without waiting for the one's answer before the next is sent; their
  // results in the same order. The first error ends it; later commands may have run all the same.
  absl::StatusOr<std::vector<Json>> ExecuteAll(absl::Span<const QmpCommand> commands,
                                               absl::Time deadline);

  // Sends a command whose result nobody waits for; its reply is dropped when it comes.
  absl::Status Post(const std::string& command, const Json& arguments, absl::Time deadline);

  // The oldest event not yet taken for which `matches` holds; waits for one. Others stay queued.
  absl::StatusOr<QmpEvent> WaitEvent(absl::FunctionRef<bool(const QmpEvent&)> matches,
                                     absl::Time deadline);
  absl::StatusOr<QmpEvent> WaitEvent(const std::string& name, absl::Time deadline);

  // Takes the events of this name that came so far, the oldest first; at most kMaxEvents.
  std::vector<QmpEvent> TakeEvents(const std::string& name);

  // Forgets the events of this name that came so far: all that QEMU sent before its last reply.
  void DropEvents(std::string_view name);

  // Ok while the connection can be used; else the error that every call returns.
  const absl::Status& health() const { return broken_; }

  // Whether the connection broke with a command in it that QEMU had not read: if QEMU has ended, it
  // never saw it. A unix socket says so (ECONNRESET where something was left unread, EPIPE where
  // nobody could read any more: unix(7), unix_release_sock in Linux).
  bool command_unread() const { return command_unread_; }

  const std::string& path() const { return path_; }
  const QmpVersion& version() const { return version_; }
  // Who listens at the socket, or why that can't be told. It is QEMU only if QEMU itself opened the
  // socket: see PeerProcess.
  const absl::StatusOr<SocketPeer>& peer() const { return peer_; }
  // Its number; -1 if it can't be told.
  pid_t peer_pid() const { return peer_.ok() ? peer_->pid : -1; }

 private:
  QmpClient(std::string path, UniqueFd socket)
      : path_(std::move(path)), socket_(std::move(socket)) {}
  absl::Status Negotiate(absl::Time deadline);
  absl::Status ReadGreeting(absl::Time deadline);
  absl::StatusOr<std::optional<Json>> AwaitReply(uint64_t id, const std::string& command,
                                                 std::string_view or_event, absl::Time deadline);
  absl::StatusOr<uint64_t> SendCommand(const std::string& command, const Json& arguments,
                                       absl::Time deadline, int fd_to_pass);
  absl::Status Send(const std::string& line, absl::Time deadline, int fd_to_pass);
  absl::StatusOr<Json> ReadMessage(absl::Time deadline);
  absl::StatusOr<std::string> ReadLine(absl::Time deadline);
  void KeepEvent(const Json& message);
  absl::Status Break(absl::Status why);

  std::string path_;
  UniqueFd socket_;
  absl::StatusOr<SocketPeer> peer_;
  QmpVersion version_;
  uint64_t next_id_ = 1;
  std::string received_;
  size_t searched_bytes_ = 0;  // of received_: no line end in there
  std::deque<QmpEvent> events_;
  absl::Status broken_;
  bool command_unread_ = false;
};

}  // namespace presync
