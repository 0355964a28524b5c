#include "transport/wire/control_channel.h"

#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/socket.h>

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "transport/clock.h"

namespace presync {
namespace {

uint32_t LoadLength(const char* p) {
  const auto* b = reinterpret_cast<const uint8_t*>(p);
  return b[0] | b[1] << 8 | b[2] << 16 | static_cast<uint32_t>(b[3]) << 24;
}

}  // namespace

ControlChannel::ControlChannel(Connection connection, std::string peer,
                               absl::Duration longest_frame)
    : connection_(std::move(connection)), peer_(std::move(peer)), longest_frame_(longest_frame) {
  // A handover is a chain of short messages: none may wait for an acknowledgement of the one
  // before.
  const int on = 1;
  ::setsockopt(connection_.fd(), IPPROTO_TCP, TCP_NODELAY, &on, sizeof(on));
}

ControlChannel::~ControlChannel() = default;

std::string ControlChannel::local_address() const {
  sockaddr_storage address = {};
  socklen_t length = sizeof(address);
  char host[NI_MAXHOST];
  auto* any = reinterpret_cast<sockaddr*>(&address);
  if (::getsockname(connection_.fd(), any, &length) != 0) return "";
  if (address.ss_family != AF_INET && address.ss_family != AF_INET6) return "";
  if (::getnameinfo(any, length, host, sizeof(host), nullptr, 0, NI_NUMERICHOST) != 0) return "";
  const std::string text = host;
  // A socket that listens for both takes IPv4 in this form.
  const std::string mapped = "::ffff:";
  return text.rfind(mapped, 0) == 0 ? text.substr(mapped.size()) : text;
}

void ControlChannel::Shutdown() { connection_.Shutdown(); }

absl::Status ControlChannel::Gone(const absl::Status& why) const {
  return absl::Status(
      why.code(), absl::StrCat("the control connection to ", peer_, " is gone: ", why.message()));
}

absl::Status ControlChannel::Send(const wire::ControlMessage& message, absl::Time deadline) {
  std::string frame(4, '\0');
  if (!message.AppendToString(&frame) || frame.size() - 4 > kMaxControlFrameBytes) {
    return absl::InternalError("a control message is too long to send");
  }
  const uint32_t length = static_cast<uint32_t>(frame.size() - 4);
  for (int i = 0; i < 4; ++i) frame[i] = static_cast<char>(length >> (8 * i));

  MutexLock lock(&send_mutex_);
  if (!send_status_.ok()) return send_status_;
  size_t sent = 0;
  while (sent < frame.size()) {
    short events = 0;
    const absl::StatusOr<size_t> n =
        connection_.TrySend(absl::MakeConstSpan(frame).subspan(sent), &events);
    if (!n.ok()) return send_status_ = Gone(n.status());
    sent += *n;
    if (*n > 0 || AwaitSocket(connection_.fd(), events, deadline).ok()) continue;
    send_status_ =
        absl::DeadlineExceededError(absl::StrCat(peer_, " does not read its control connection"));
    return send_status_;
  }
  return absl::OkStatus();
}

absl::Status ControlChannel::FillTo(size_t bytes, absl::Time deadline) {
  char buffer[64 << 10];
  while (received_.size() < bytes) {
    // Never beyond the frame: what follows it may belong to somebody else's protocol.
    const size_t want = std::min(sizeof(buffer), bytes - received_.size());
    short events = 0;
    const absl::StatusOr<size_t> n = connection_.TryReceive({buffer, want}, &events);
    if (!n.ok()) return Gone(n.status());
    if (received_.empty()) frame_began_ = MonotonicNow();
    received_.append(buffer, *n);
    if (*n > 0) continue;
    if (!received_.empty() && MonotonicNow() - frame_began_ > longest_frame_) {
      return absl::InvalidArgumentError(
          absl::StrCat(peer_, " began a control frame and does not end it"));
    }
    if (absl::Status s = AwaitSocket(connection_.fd(), events, deadline); !s.ok()) return s;
  }
  return absl::OkStatus();
}

absl::StatusOr<wire::ControlMessage> ControlChannel::Receive(absl::Time deadline) {
  if (absl::Status s = FillTo(4, deadline); !s.ok()) return s;
  const uint32_t length = LoadLength(received_.data());
  if (length > kMaxControlFrameBytes) {
    return absl::InvalidArgumentError(absl::StrCat(peer_, " sent a control frame of ", length,
                                                   " bytes; the limit is ", kMaxControlFrameBytes));
  }
  if (absl::Status s = FillTo(4 + length, deadline); !s.ok()) return s;
  wire::ControlMessage message;
  const bool parsed = message.ParseFromArray(received_.data() + 4, static_cast<int>(length));
  received_.clear();
  if (!parsed || message.body_case() == wire::ControlMessage::BODY_NOT_SET) {
    return absl::InvalidArgumentError(
        absl::StrCat(peer_, " sent a control message that this version can't read"));
  }
  return message;
}

}  // namespace presync
