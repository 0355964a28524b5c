#include "tests/fuzz/control_peer.h"

#include <poll.h>
#include <sys/socket.h>

#include <cerrno>

namespace presync::fuzz {
namespace {

constexpr int kAnswerMs = 20;
constexpr size_t kMaxSteps = 200;  // an input is about a conversation, not about patience

// Reads what came and tells of whole frames. False: hung up.
class FrameReader {
 public:
  FrameReader(int socket, const std::function<void(const wire::ControlMessage&)>& on_frame)
      : socket_(socket), on_frame_(on_frame) {}

  bool Drain() {
    char buffer[16384];
    while (true) {
      const ssize_t n = ::recv(socket_, buffer, sizeof(buffer), MSG_DONTWAIT);
      if (n < 0 && errno == EINTR) continue;
      if (n < 0 && errno == EAGAIN) return true;
      if (n <= 0) return false;
      received_.append(buffer, static_cast<size_t>(n));
      Tell();
    }
  }
  size_t frames() const { return frames_; }

 private:
  void Tell() {
    while (received_.size() >= 4) {
      FuzzInput head(reinterpret_cast<const uint8_t*>(received_.data()), 4);
      const size_t length = head.U32();
      if (received_.size() < 4 + length) return;
      wire::ControlMessage message;
      FUZZ_REQUIRE(message.ParseFromArray(received_.data() + 4, static_cast<int>(length)));
      received_.erase(0, 4 + length);
      ++frames_;
      on_frame_(message);
    }
  }

  const int socket_;
  const std::function<void(const wire::ControlMessage&)>& on_frame_;
  std::string received_;
  size_t frames_ = 0;
};

void AwaitFrame(int socket, FrameReader* reader) {
  const size_t before = reader->frames();
  pollfd p = {.fd = socket, .events = POLLIN, .revents = 0};
  while (reader->frames() == before && ::poll(&p, 1, kAnswerMs) > 0) {
    if (!reader->Drain()) return;
  }
}

}  // namespace

std::string FrameOf(std::string_view message) {
  return FuzzOutput().Number(message.size(), 4).Raw(message).text();
}

ControlScript TakeScript(FuzzInput* input) {
  ControlScript script;
  while (!input->empty() && script.steps.size() < kMaxSteps) {
    const uint8_t kind = input->Byte() % 4;
    const std::string_view chunk = input->Chunk();
    if (kind == 2) {
      script.streams.emplace_back(chunk);
    } else {
      script.steps.push_back({kind == 3 ? std::string(chunk) : FrameOf(chunk), kind == 1});
    }
  }
  return script;
}

void PutMessage(const wire::ControlMessage& message, bool wait, FuzzOutput* out) {
  out->Byte(wait ? 1 : 0).Chunk(message.SerializeAsString());
}

void PutStream(std::string_view bytes, FuzzOutput* out) { out->Byte(2).Chunk(bytes); }

void PlayControl(UniqueFd socket, const std::vector<ControlStep>& steps,
                 const std::function<void(const wire::ControlMessage&)>& on_frame) {
  FrameReader reader(socket.get(), on_frame);
  bool open = true;
  for (const ControlStep& step : steps) {
    if (step.wait) AwaitFrame(socket.get(), &reader);
    for (size_t sent = 0; open && sent < step.bytes.size();) {
      const ssize_t n = ::send(socket.get(), step.bytes.data() + sent, step.bytes.size() - sent,
                               MSG_NOSIGNAL | MSG_DONTWAIT);
      if (n > 0) {
        sent += static_cast<size_t>(n);
        continue;
      }
      if (errno != EAGAIN) open = false;
      pollfd p = {.fd = socket.get(), .events = POLLIN | POLLOUT, .revents = 0};
      ::poll(&p, 1, -1);
      open = open && reader.Drain();
    }
    if (!open) break;
  }
  ::shutdown(socket.get(), SHUT_WR);
  pollfd p = {.fd = socket.get(), .events = POLLIN, .revents = 0};
  while (reader.Drain()) ::poll(&p, 1, -1);
}

SocketPair MakeSocketPair() {
  int ends[2];
  FUZZ_REQUIRE(::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends) == 0);
  return {UniqueFd(ends[0]), UniqueFd(ends[1])};
}

void SendAtOnce(int socket, std::string_view bytes) {
  (void)!::send(socket, bytes.data(), bytes.size(), MSG_NOSIGNAL | MSG_DONTWAIT);
}

}  // namespace presync::fuzz
