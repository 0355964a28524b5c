// A monitor with a script: what a QEMU might say, and what it should not.
#pragma once

#include <functional>
#include <string>
#include <string_view>
#include <thread>

#include "qemu-glue/qmp/json_read.h"
#include "transport/unique_fd.h"

namespace presync {

inline constexpr std::string_view kGreeting =
    R"({"QMP": {"version": {"qemu": {"micro": 2, "minor": 1, "major": 9}, "package": ""}, "capabilities": []}})"
    "\n";

// One accepted connection, seen from QEMU's side. Used by the server's thread alone.
class FakeQmpConnection {
 public:
  explicit FakeQmpConnection(UniqueFd socket) : socket_(std::move(socket)) {}

  // False: the client has hung up.
  bool Send(std::string_view text);
  // The next command; null once the client has hung up. A descriptor that came along is kept.
  Json ReadCommand();
  void Reply(const Json& command, const Json& result);
  void Refuse(const Json& command, const std::string& text);
  // Greets and answers qmp_capabilities.
  void Greet();
  // Blocks until the client hangs up.
  void AwaitHangUp();

  const UniqueFd& passed_fd() const { return passed_; }

 private:
  UniqueFd socket_;
  UniqueFd passed_;
  std::string received_;
};

// Listens at `path()` and runs the script for the first connections, one after another, in a thread
// of its own.
class FakeQmpServer {
 public:
  using Script = std::function<void(FakeQmpConnection&)>;

  explicit FakeQmpServer(Script script, int connections = 1);
  ~FakeQmpServer();  // joins the thread: the client must have hung up, or the script have ended

  const std::string& path() const { return path_; }

 private:
  std::string folder_;
  std::string path_;
  UniqueFd listener_;
  std::thread thread_;
};

// A script that answers each command from `answer`, null for "no such command".
FakeQmpServer::Script AnswerEach(
    std::function<Json(const std::string& command, const Json& arguments)> answer);

}  // namespace presync
