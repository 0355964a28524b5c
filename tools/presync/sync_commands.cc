#include "tools/presync/sync_commands.h"

#include <chrono>
#include <cstdio>
#include <memory>
#include <thread>

#include "absl/strings/str_cat.h"
#include "tools/common/local_api.h"
#include "tools/presync/render.h"

namespace presync {
namespace {

using Json = nlohmann::json;

// presyncd answers a start within its own deadlines: 20 s for this host's QEMU and as long for the
// connection, some 45 s for the target's QEMU and one more for each GiB that has to be reserved
// there. This only bounds what a broken presyncd can make a person wait for; Ctrl-C ends it.
constexpr absl::Duration kLongestStart = absl::Minutes(30);
constexpr absl::Duration kLongestStop = absl::Seconds(90);

struct StartOptions {
  std::string name, domain, qmp, to, max_launch_time, max_bandwidth, transport, glue, dirty_log,
      compression, rdma_devices;
  int rdma_queue_pairs = 0;  // 0: the configuration's
  bool wait = false;
};

struct StatusOptions {
  std::string name;
  bool watch = false;
  double interval_s = 1;
};

struct LaunchOptions {
  std::string name;
  bool verify = false;
  bool wait = false;
};

Answer AskStatus(const std::string& name, const CommandContext& context, const char* goes_on) {
  return Ask(context, {{"command", "status"}, {"name", name}}, absl::Seconds(10), goes_on);
}

std::string SyncGoesOn(const std::string& name) {
  return absl::StrCat("the sync goes on: presync status ", name, " shows it, presync stop ", name,
                      " ends it");
}

// Waits until the first pass is done, with one progress line that is rewritten in a terminal.
int WaitForSync(const std::string& name, const CommandContext& context) {
  const std::string goes_on = SyncGoesOn(name);
  while (!context.interrupted) {
    const Answer answer = AskStatus(name, context, goes_on.c_str());
    if (answer.exit_code != kOk) return answer.exit_code;
    const Json guests = answer.json.value("guests", Json::array());
    const Json guest = guests.empty() ? Json::object() : guests[0];
    const std::string state = TextOr(guest, "state", "");
    if (!context.json) ShowProgress(RenderGuestLine(guest), state == "syncing");
    if (state == "syncing") return Print({guest}, context, RenderGuest);
    if (state != "first-pass" && state != "connecting") {
      return Fail(absl::FailedPreconditionError(
                      absl::StrCat(name, " is ", state, ": ", TextOr(guest, "problem", ""))),
                  context);
    }
    std::this_thread::sleep_for(std::chrono::milliseconds(200));
  }
  ShowProgress("", /*last=*/true);
  return Interrupted(goes_on, context);
}

int Start(const StartOptions& options, const CommandContext& context) {
  if (options.domain.empty() == (options.name.empty() || options.qmp.empty())) {
    return Fail(absl::InvalidArgumentError(
                    "start takes a NAME with --qmp, or --domain for a guest of libvirt's"),
                context, kUsage);
  }
  Json request = {{"command", "start"},
                  {"name", options.name},
                  {"domain", options.domain},
                  {"qmp", AbsolutePath(options.qmp)},
                  {"to", options.to},
                  {"max_launch_time", options.max_launch_time},
                  {"max_bandwidth", options.max_bandwidth},
                  {"glue", AbsolutePath(options.glue)}};
  if (!options.dirty_log.empty()) request["dirty_log"] = options.dirty_log;
  if (!options.transport.empty()) request["transport"] = options.transport;
  if (options.rdma_queue_pairs > 0) request["rdma_queue_pairs"] = options.rdma_queue_pairs;
  if (!options.rdma_devices.empty()) request["rdma_devices"] = options.rdma_devices;
  if (!options.compression.empty()) request["compression"] = options.compression;
  const std::string name = options.name.empty() ? options.domain : options.name;
  const std::string goes_on = absl::StrCat("presyncd goes on with the start: presync status ", name,
                                           " shows what comes of it, presync "
                                           "stop ",
                                           name, " ends it");
  const Answer answer = Ask(context, request, kLongestStart, goes_on);
  if (answer.exit_code != kOk || !options.wait) return Print(answer, context, RenderGuest);
  return WaitForSync(TextOr(answer.json, "name", options.name), context);
}

int Status(const StatusOptions& options, const CommandContext& context) {
  do {
    const Answer answer = AskStatus(options.name, context, "presyncd has not answered");
    if (answer.exit_code == kOk && !options.name.empty() && answer.json["guests"].empty() &&
        answer.json["incoming"].empty() && answer.json["open"].empty()) {
      return Fail(absl::NotFoundError(absl::StrCat("presyncd here knows no guest ", options.name)),
                  context);
    }
    if (options.watch && !context.json) ClearScreen();
    if (int code = Print(answer, context, RenderStatus); code != kOk) return code;
    std::fflush(stdout);
    const auto until = std::chrono::steady_clock::now() +
                       std::chrono::duration<double>(options.watch ? options.interval_s : 0);
    while (!context.interrupted && std::chrono::steady_clock::now() < until) {
      std::this_thread::sleep_for(std::chrono::milliseconds(50));
    }
  } while (options.watch && !context.interrupted);
  return kOk;
}

int Launch(const LaunchOptions& options, const CommandContext& context) {
  const Json request = {{"command", "launch"},
                        {"name", options.name},
                        {"verify", options.verify},
                        {"wait_ms", options.wait ? 3'600'000 : 0}};
  const std::string goes_on =
      options.wait ? absl::StrCat("presyncd launches ", options.name,
                                  " as soon as its memory was copied "
                                  "once. Until then presync stop ",
                                  options.name,
                                  " calls that off, and "
                                  "ends the sync; presync status ",
                                  options.name, " shows how far it is")
                   : absl::StrCat(
                         "the launch goes on, and can't be stopped any more: within a minute or "
                         "two the guest runs there, or goes on here. presync status ",
                         options.name, " shows which");
  return Print(Ask(context, request, absl::Hours(2), goes_on), context, RenderLaunch);
}

void AddLinkOptions(CLI::App* app, StartOptions* o) {
  app->add_option("--max-bandwidth", o->max_bandwidth,
                  "Cap of the background sync, e.g. 400Mbit; a launch does not heed it");
  app->add_option("--transport", o->transport,
                  "auto (RDMA where both hosts have it, else TCP), rdma or tcp");
  app->add_option("--rdma-queue-pairs", o->rdma_queue_pairs, "Queue pairs a device, 1 to 16")
      ->check(CLI::Range(1, 16));
  app->add_option("--rdma-devices", o->rdma_devices,
                  "Only these RDMA devices of this host, e.g. mlx5_0,mlx5_1");
  app->add_option("--compression", o->compression, "none, lz4, zstd or auto (TCP)");
}

}  // namespace

RunCommand AddStart(CLI::App* app, CommandContext* context) {
  auto o = std::make_shared<StartOptions>();
  CLI::Option* name =
      app->add_option("name", o->name, "The guest's name, as the target's configuration has it");
  CLI::Option* qmp =
      app->add_option("--qmp", o->qmp, "Socket of a QMP monitor that presync has for itself");
  app->add_option("--domain", o->domain, "A guest that libvirt manages, by its name or UUID")
      ->excludes(name)
      ->excludes(qmp);
  app->add_option("--to", o->to, "Target host, HOST or HOST:PORT (port 7350)")->required();
  app->add_option("--max-launch-time", o->max_launch_time,
                  "What a launch may take, from the order to the guest running on the target, e.g. "
                  "100ms (default: the configuration's)");
  AddLinkOptions(app, o.get());
  app->add_option("--glue", o->glue, "The plug-in's socket, if it is not found by itself");
  app->add_option("--dirty-log", o->dirty_log, "auto, uffd-async or uffd-handler");
  app->add_flag("--wait", o->wait, "Return when all memory was copied once");
  return [o, context] { return Start(*o, *context); };
}

RunCommand AddStatus(CLI::App* app, CommandContext* context) {
  auto o = std::make_shared<StatusOptions>();
  app->add_option("name", o->name, "Only this guest");
  app->add_flag("--watch", o->watch, "Show it again and again, until Ctrl-C");
  app->add_option("--interval", o->interval_s, "Seconds between two looks")
      ->capture_default_str()
      ->check(CLI::Range(0.1, 3600.0));
  return [o, context] { return Status(*o, *context); };
}

RunCommand AddLaunch(CLI::App* app, CommandContext* context) {
  auto o = std::make_shared<LaunchOptions>();
  app->add_option("name", o->name, "The guest's name")->required();
  app->add_flag("--verify", o->verify,
                "Compare all memory by hashes before the target may run it (costs downtime)");
  app->add_flag("--wait", o->wait, "Wait for the first full sync");
  return [o, context] { return Launch(*o, *context); };
}

RunCommand AddVerify(CLI::App* app, CommandContext* context) {
  auto name = std::make_shared<std::string>();
  app->add_option("name", *name, "The guest's name")->required();
  return [name, context] {
    const std::string goes_on = absl::StrCat(
        "presyncd goes on comparing, which harms nothing, and writes what differs to its log: "
        "presync status ",
        *name, " counts it. A launch ends it, and presync stop ", *name, ", with the sync");
    const Answer answer =
        Ask(*context, {{"command", "verify"}, {"name", *name}}, absl::Hours(24), goes_on);
    const int code = Print(answer, *context, RenderVerify);
    if (code != kOk) return code;
    return NumberOr(answer.json, "pages_differing", 0) == 0 ? int{kOk} : int{kFailed};
  };
}

RunCommand AddStop(CLI::App* app, CommandContext* context) {
  auto name = std::make_shared<std::string>();
  app->add_option("name", *name, "The guest's name")->required();
  return [name, context] {
    const std::string goes_on = absl::StrCat("presyncd goes on ending the sync: presync status ",
                                             *name, " shows when it is gone");
    return Print(Ask(*context, {{"command", "stop"}, {"name", *name}}, kLongestStop, goes_on),
                 *context, RenderStopped);
  };
}

RunCommand AddSettle(CLI::App* app, CommandContext* context) {
  auto name = std::make_shared<std::string>();
  auto where = std::make_shared<std::string>();
  app->add_option("name", *name, "The guest's name, as presync status shows it")->required();
  app->add_option("where", *where,
                  "Of a guest that was given up here: here (it certainly does not run on the other "
                  "host, and goes on here), there (it runs there, or wherever it moved on to). Of "
                  "one that came here: ran (it runs here, or did), never-ran (it never did, and "
                  "never will). forget: the QEMU at its old address is another guest's")
      ->required()
      ->check(CLI::IsMember({"here", "there", "ran", "never-ran", "forget"}));
  auto force = std::make_shared<bool>(false);
  app->add_flag("--force", *force,
                "Also where the other host says otherwise: two may run then, or none; the refusal "
                "says which");
  return [name, where, force, context] {
    return Print(Ask(*context,
                     {{"command", "settle"}, {"name", *name}, {"where", *where}, {"force", *force}},
                     absl::Seconds(90), "presyncd goes on settling it: presync status shows how"),
                 *context, RenderSettled);
  };
}

}  // namespace presync
