// presyncd: one per host. Keeps guests in sync with other hosts, and receives those of others.
#include <google/protobuf/stubs/logging.h>
#include <malloc.h>
#include <poll.h>
#include <signal.h>
#include <spdlog/pattern_formatter.h>
#include <spdlog/sinks/stdout_sinks.h>
#include <spdlog/spdlog.h>
#include <sys/prctl.h>
#include <sys/signalfd.h>
#include <sys/stat.h>
#include <systemd/sd-daemon.h>
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <cstdio>
#include <string>
#include <utility>

#include "absl/strings/str_cat.h"
#include "tools/presyncd/config.h"
#include "tools/presyncd/daemon.h"
#include "tools/presyncd/local_server.h"
#include "tools/presyncd/qemu_users_api.h"
#include "transport/printable.h"

namespace presync {
namespace {

constexpr int kTickMs = 1000;
constexpr size_t kMostLineBytes = 16 << 10;  // of the log

// The text of a line, without effect on a terminal or on what a line is: others' words get into it
// in many ways.
class PrintableLine final : public spdlog::custom_flag_formatter {
 public:
  void format(const spdlog::details::log_msg& message, const std::tm&,
              spdlog::memory_buf_t& out) override {
    const std::string text =
        PrintableText({message.payload.data(), message.payload.size()}, kMostLineBytes);
    out.append(text.data(), text.data() + text.size());
  }
  std::unique_ptr<custom_flag_formatter> clone() const override {
    return std::make_unique<PrintableLine>();
  }
};

// Under systemd the journal has its own times and takes the level from a prefix.
void SetUpLog(const std::string& level) {
  auto logger = spdlog::stderr_logger_mt("presyncd");
  spdlog::set_default_logger(logger);
  const bool journal = ::getenv("JOURNAL_STREAM") != nullptr;
  auto formatter = std::make_unique<spdlog::pattern_formatter>();
  formatter->add_flag<PrintableLine>('*').set_pattern(journal ? "%l: %*"
                                                              : "%Y-%m-%d %H:%M:%S.%e %l: %*");
  spdlog::set_formatter(std::move(formatter));
  spdlog::set_level(spdlog::level::from_str(level));
}

// Blocks SIGINT, SIGTERM and SIGHUP for all threads (call it before there are any); readable when
// one came.
UniqueFd EndSignals() {
  sigset_t set;
  sigemptyset(&set);
  sigaddset(&set, SIGHUP);
  sigaddset(&set, SIGINT);
  sigaddset(&set, SIGTERM);
  ::pthread_sigmask(SIG_BLOCK, &set, nullptr);
  ::signal(SIGPIPE, SIG_IGN);
  return UniqueFd(::signalfd(-1, &set, SFD_CLOEXEC));
}

// The signal that made `signals` readable.
uint32_t TakeSignal(const UniqueFd& signals) {
  signalfd_siginfo taken = {};
  (void)!::read(signals.get(), &taken, sizeof(taken));
  return taken.ssi_signo;
}

// What links and launches use for a moment (2 MB a stream) goes back to the system. As it comes,
// glibc would raise its threshold to the largest block it ever freed, and keep the most that each
// thread ever held in one of 8 heaps a core: a soak of an hour saw 20 MB grow to 65 MB
// (2026-11-28).
void KeepNoMemoryInReserve() {
  ::mallopt(M_MMAP_THRESHOLD, 256 << 10);
  ::mallopt(M_ARENA_MAX, 2);
}

// protobuf writes a line of its own for a message that is not well-formed, each time; we say what
// was refused, and from whom, and not more often than we want to.
void LetProtobufBeSilent() { google::protobuf::SetLogHandler(nullptr); }

// Another one ends the process as it does by default.
void UnblockEndSignals() {
  sigset_t set;
  sigemptyset(&set);
  sigaddset(&set, SIGINT);
  sigaddset(&set, SIGTERM);
  ::pthread_sigmask(SIG_UNBLOCK, &set, nullptr);
}

int Serve(Config config, const UniqueFd& signals) {
  const std::string socket = config.socket;
  absl::StatusOr<LocalAccess> access = LocalAccess::ForGroup(config.socket_group);
  if (!access.ok()) {
    spdlog::error("{}", std::string(access.status().message()));
    return 1;
  }
  absl::StatusOr<std::unique_ptr<Daemon>> daemon = Daemon::Create(std::move(config));
  if (!daemon.ok()) {
    spdlog::error("{}", std::string(daemon.status().message()));
    return 1;
  }
  absl::StatusOr<std::unique_ptr<LocalServer>> server = LocalServer::Start(
      socket, *access, [&](const nlohmann::json& request) { return (*daemon)->Handle(request); });
  if (!server.ok()) {
    spdlog::error("{}", std::string(server.status().message()));
    return 1;
  }
  sd_notify(0, "READY=1");
  spdlog::info("ready; commands at {}", socket);
  while (true) {
    pollfd p = {.fd = signals.get(), .events = POLLIN, .revents = 0};
    if (::poll(&p, 1, kTickMs) > 0) {
      if (TakeSignal(signals) != SIGHUP) break;
      (*daemon)->ReloadCertificates();
      continue;
    }
    (*daemon)->Tick();
    sd_notify(0, absl::StrCat("STATUS=", (*daemon)->Summary()).c_str());
  }
  sd_notify(0, "STOPPING=1");
  spdlog::info("stopping; guests go on where they run");
  // The commands first: a launch under way is let finish. A second signal does not wait for it.
  UnblockEndSignals();
  server->reset();
  daemon->reset();
  return 0;
}

// What the file alone does not tell. A certificate that can't be looked at by whoever checks is
// only told of: its key is presyncd's. Nor is it an error where QEMUs could not be apart if he
// started presyncd; but a user that this host lacks is one.
int Check(const Config& config, const std::string& path) {
  const absl::Status tls =
      config.tls.certificate.empty() ? absl::OkStatus() : TlsIdentity::Load(config.tls).status();
  const absl::StatusOr<QemuUsers> users = FindQemuUsers(config);
  const absl::Status wrong = absl::IsInvalidArgument(tls)       ? tls
                             : absl::IsNotFound(users.status()) ? users.status()
                                                                : absl::OkStatus();
  if (!wrong.ok()) {
    std::fprintf(stderr, "presyncd: %s: %s\n", path.c_str(), std::string(wrong.message()).c_str());
    return 2;
  }
  std::printf("%s is good\n", path.c_str());
  if (!tls.ok()) {
    std::printf("note: this host's certificate was not looked at: %s\n",
                std::string(tls.message()).c_str());
  }
  const std::string not_apart =
      users.ok() ? NotApart(config, *users) : std::string(users.status().message());
  if (!not_apart.empty()) std::printf("note: started by this user: %s\n", not_apart.c_str());
  for (const std::string& note : ConfigNotes(config)) std::printf("note: %s\n", note.c_str());
  return 0;
}

int Main(int argc, char** argv) {
  KeepNoMemoryInReserve();
  LetProtobufBeSilent();
  CLI::App app{
      "presyncd keeps the memory of running guests mirrored on other hosts, and receives the "
      "guests "
      "of others.\nOne runs on each host; `presync` is its command line."};
  std::string config_path = kDefaultConfigPath;
  std::string log_level;
  bool check = false;
  bool insecure = false;
  app.add_option("-c,--config", config_path, "Configuration file")->capture_default_str();
  app.add_option("--log-level", log_level, "debug, info, warn or error (over the file's)");
  app.add_flag("--insecure", insecure,
               "Talk to other hosts without certificates: nothing is encrypted, anybody may push "
               "guests here");
  app.add_flag("--check", check, "Read the configuration, say what is wrong with it, and end");
  app.set_version_flag("--version", "presyncd " PRESYNC_VERSION);
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    return app.exit(error) == 0 ? 0 : 2;
  }

  absl::StatusOr<Config> config = LoadConfig(config_path);
  if (!config.ok()) {
    std::fprintf(stderr, "presyncd: %s\n", std::string(config.status().message()).c_str());
    return 2;
  }
  config->insecure = config->insecure || insecure;
  if (absl::Status s = CheckSecurity(*config); !s.ok()) {
    std::fprintf(stderr, "presyncd: %s: %s\n", config_path.c_str(),
                 std::string(s.message()).c_str());
    return 2;
  }
  if (check) return Check(*config, config_path);
  // The unit hands capabilities down to whatever is started; they are meant for presyncd alone, not
  // for the QEMUs that it starts.
  ::prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0);
  // Its memory has guests' pages and the host's key in it: no core dump, and no look into it by a
  // process of the same user.
  ::prctl(PR_SET_DUMPABLE, 0, 0, 0, 0);
  ::umask(077);  // what is made here is nobody else's, unless it is said
  const UniqueFd signals = EndSignals();
  SetUpLog(log_level.empty() ? config->log_level : log_level);
  return Serve(*std::move(config), signals);
}

}  // namespace
}  // namespace presync

int main(int argc, char** argv) { return presync::Main(argc, argv); }
