#include "tests/qemu-glue/fake_qmp_server.h"

#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <array>
#include <cstdlib>
#include <cstring>
#include <utility>

namespace presync {

bool FakeQmpConnection::Send(std::string_view text) {
  while (!text.empty()) {
    const ssize_t count = ::send(socket_.get(), text.data(), text.size(), MSG_NOSIGNAL);
    if (count <= 0) return false;
    text.remove_prefix(static_cast<size_t>(count));
  }
  return true;
}

Json FakeQmpConnection::ReadCommand() {
  while (received_.find('\n') == std::string::npos) {
    std::array<char, 4096> chunk;
    alignas(cmsghdr) std::array<char, CMSG_SPACE(sizeof(int))> control = {};
    iovec part = {chunk.data(), chunk.size()};
    msghdr message = {};
    message.msg_iov = &part;
    message.msg_iovlen = 1;
    message.msg_control = control.data();
    message.msg_controllen = control.size();
    const ssize_t count = ::recvmsg(socket_.get(), &message, MSG_CMSG_CLOEXEC);
    if (count <= 0) return nullptr;
    if (const cmsghdr* header = CMSG_FIRSTHDR(&message); header != nullptr) {
      int fd = -1;
      std::memcpy(&fd, CMSG_DATA(header), sizeof(fd));
      passed_.reset(fd);
    }
    received_.append(chunk.data(), static_cast<size_t>(count));
  }
  const size_t end = received_.find('\n');
  Json command = Json::parse(received_.substr(0, end), nullptr, false);
  received_.erase(0, end + 1);
  return command;
}

void FakeQmpConnection::Reply(const Json& command, const Json& result) {
  Send(ToText({{"return", result}, {"id", command["id"]}}) + "\n");
}

void FakeQmpConnection::Refuse(const Json& command, const std::string& text) {
  Send(ToText({{"error", {{"class", "GenericError"}, {"desc", text}}}, {"id", command["id"]}}) +
       "\n");
}

void FakeQmpConnection::Greet() {
  Send(kGreeting);
  const Json command = ReadCommand();
  if (!command.is_null()) Reply(command, Json::object());  // or it only looked who listens
}

void FakeQmpConnection::AwaitHangUp() {
  while (!ReadCommand().is_null()) {
  }
}

FakeQmpServer::FakeQmpServer(Script script, int connections) {
  char folder[] = "/tmp/presync-fake-qmp-XXXXXX";
  if (::mkdtemp(folder) == nullptr) std::abort();
  folder_ = folder;
  path_ = folder_ + "/qmp";
  listener_ = UniqueFd(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0));
  sockaddr_un address = {};
  address.sun_family = AF_UNIX;
  std::memcpy(address.sun_path, path_.data(), path_.size());
  if (::bind(listener_.get(), reinterpret_cast<sockaddr*>(&address), sizeof(address)) != 0 ||
      ::listen(listener_.get(), 8) != 0) {
    std::abort();
  }
  thread_ = std::thread([this, connections, script = std::move(script)] {
    for (int i = 0; i < connections; ++i) {
      UniqueFd socket(::accept4(listener_.get(), nullptr, nullptr, SOCK_CLOEXEC));
      if (!socket.valid()) return;
      FakeQmpConnection connection(std::move(socket));
      script(connection);
    }
  });
}

FakeQmpServer::~FakeQmpServer() {
  ::shutdown(listener_.get(), SHUT_RDWR);  // wakes a thread that nobody connected to
  thread_.join();
  ::unlink(path_.c_str());
  ::rmdir(folder_.c_str());
}

FakeQmpServer::Script AnswerEach(
    std::function<Json(const std::string& command, const Json& arguments)> answer) {
  return [answer = std::move(answer)](FakeQmpConnection& qemu) {
    qemu.Greet();
    for (Json command = qemu.ReadCommand(); !command.is_null(); command = qemu.ReadCommand()) {
      const Json* arguments = FindMember(command, "arguments");
      const Json result =
          answer(StringAt(command, "execute"), arguments == nullptr ? Json() : *arguments);
      if (result.is_null()) {
        qemu.Refuse(command, "not in the script");
      } else {
        qemu.Reply(command, result);
      }
    }
  };
}

}  // namespace presync
