// presync: what a person types. Talks to the presyncd of this host.
#include <signal.h>

#include <CLI/CLI.hpp>
#include <atomic>
#include <cstdio>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <string>
#include <thread>

#include "absl/strings/str_cat.h"
#include "tools/common/local_api.h"
#include "tools/common/units.h"
#include "tools/presync/bench.h"
#include "tools/presync/doctor.h"
#include "tools/presync/record.h"
#include "tools/presync/render.h"
#include "tools/presync/replay.h"
#include "tools/presyncd/config.h"
#include "transport/rdma/rdma_options.h"

namespace presync {
namespace {

using Json = nlohmann::json;

std::atomic<bool> interrupted = false;

// Exit codes, as in the help text.
enum ExitCode { kOk = 0, kFailed = 1, kUsage = 2, kNoDaemon = 3 };

struct Options {
  std::string socket = kDefaultSocketPath;
  bool json = false;
  std::string name;
  // start
  std::string qmp, to, max_launch_time, max_bandwidth, transport, glue, dirty_log, compression,
      rdma_devices;
  int rdma_queue_pairs = 0;  // 0: the configuration's
  bool wait = false;
  // status
  bool watch = false;
  double interval_s = 1;
  // settle
  std::string where;
  // launch
  bool verify = false;
  RecordOptions record;
};

int Fail(const absl::Status& status, bool json, ExitCode code = kFailed) {
  if (json) std::printf("%s\n", StatusToJson(status).dump().c_str());
  std::fprintf(stderr, "presync: %s\n", std::string(status.message()).c_str());
  return code;
}

// presyncd's answer, or the exit code after saying what went wrong.
struct Answer {
  Json json;
  int exit_code = kOk;
};

Answer Ask(const Options& options, const Json& request, absl::Duration longest) {
  absl::StatusOr<Json> json = CallLocal(options.socket, request, absl::Now() + longest);
  if (!json.ok()) return {{}, Fail(json.status(), options.json, kNoDaemon)};
  if (absl::Status s = JsonToStatus(*json); !s.ok()) return {{}, Fail(s, options.json)};
  return {*std::move(json)};
}

Answer AskStatus(const Options& options) {
  return Ask(options, {{"command", "status"}, {"name", options.name}}, absl::Seconds(10));
}

// presyncd opens the paths that it is told, from a folder of its own.
std::string Absolute(const std::string& path) {
  return path.empty() ? path : std::filesystem::absolute(path).string();
}

int Print(const Answer& answer, const Options& options, std::string (*render)(const Json&)) {
  if (answer.exit_code != kOk) return answer.exit_code;
  std::printf("%s\n", options.json ? answer.json.dump().c_str() : render(answer.json).c_str());
  return kOk;
}

// Waits until the first pass is done, with one progress line that is rewritten in a terminal.
int WaitForSync(const Options& options) {
  while (!interrupted) {
    const Answer answer = AskStatus(options);
    if (answer.exit_code != kOk) return answer.exit_code;
    const Json guests = answer.json.value("guests", Json::array());
    const Json guest = guests.empty() ? Json::object() : guests[0];
    const std::string state = TextOr(guest, "state", "");
    if (!options.json) ShowProgress(RenderGuestLine(guest), state == "syncing");
    if (state == "syncing") return Print({guest}, options, RenderGuest);
    if (state != "first-pass" && state != "connecting") {
      return Fail(absl::FailedPreconditionError(absl::StrCat(options.name, " is ", state, ": ",
                                                             TextOr(guest, "problem", ""))),
                  options.json);
    }
    std::this_thread::sleep_for(std::chrono::milliseconds(200));
  }
  std::fprintf(stderr, "\npresync: no longer waiting; the sync goes on (presync stop %s ends it)\n",
               options.name.c_str());
  return kFailed;
}

int Start(const Options& options) {
  const Json request = {{"command", "start"},
                        {"name", options.name},
                        {"qmp", Absolute(options.qmp)},
                        {"to", options.to},
                        {"max_launch_time", options.max_launch_time},
                        {"max_bandwidth", options.max_bandwidth},
                        {"glue", Absolute(options.glue)}};
  Json full = request;
  if (!options.dirty_log.empty()) full["dirty_log"] = options.dirty_log;
  if (!options.transport.empty()) full["transport"] = options.transport;
  if (options.rdma_queue_pairs > 0) full["rdma_queue_pairs"] = options.rdma_queue_pairs;
  if (!options.rdma_devices.empty()) full["rdma_devices"] = options.rdma_devices;
  if (!options.compression.empty()) full["compression"] = options.compression;
  const Answer answer = Ask(options, full, absl::Seconds(90));
  if (answer.exit_code != kOk || !options.wait) return Print(answer, options, RenderGuest);
  return WaitForSync(options);
}

int Status(const Options& options) {
  do {
    const Answer answer = AskStatus(options);
    if (answer.exit_code == kOk && !options.name.empty() && answer.json["guests"].empty() &&
        answer.json["incoming"].empty() && answer.json["open"].empty()) {
      return Fail(absl::NotFoundError(absl::StrCat("presyncd here knows no guest ", options.name)),
                  options.json);
    }
    if (options.watch && !options.json) ClearScreen();
    if (int code = Print(answer, options, RenderStatus); code != kOk) return code;
    std::fflush(stdout);
    const auto until = std::chrono::steady_clock::now() +
                       std::chrono::duration<double>(options.watch ? options.interval_s : 0);
    while (!interrupted && std::chrono::steady_clock::now() < until) {
      std::this_thread::sleep_for(std::chrono::milliseconds(50));
    }
  } while (options.watch && !interrupted);
  return kOk;
}

int Launch(const Options& options) {
  const Json request = {{"command", "launch"},
                        {"name", options.name},
                        {"verify", options.verify},
                        {"wait_ms", options.wait ? 3'600'000 : 0}};
  return Print(Ask(options, request, absl::Hours(2)), options, RenderLaunch);
}

int Settle(const Options& options) {
  return Print(
      Ask(options, {{"command", "settle"}, {"name", options.name}, {"where", options.where}},
          absl::Seconds(90)),
      options, RenderSettled);
}

int Stop(const Options& options) {
  return Print(Ask(options, {{"command", "stop"}, {"name", options.name}}, absl::Seconds(60)),
               options, RenderStopped);
}

void AddStart(CLI::App* app, Options* o) {
  app->add_option("name", o->name, "The guest's name, as the target's configuration has it")
      ->required();
  app->add_option("--qmp", o->qmp, "Socket of a QMP monitor that presync has for itself")
      ->required();
  app->add_option("--to", o->to, "Target host, HOST or HOST:PORT (port 7350)")->required();
  app->add_option("--max-launch-time", o->max_launch_time,
                  "What a launch may take, from the order to the guest running on the target, e.g. "
                  "100ms (default: the configuration's)");
  app->add_option("--max-bandwidth", o->max_bandwidth,
                  "Cap of the background sync, e.g. 400Mbit; a launch does not heed it");
  app->add_option("--transport", o->transport,
                  "auto (RDMA where both hosts have it, else TCP), rdma or tcp");
  app->add_option("--rdma-queue-pairs", o->rdma_queue_pairs, "Queue pairs a device, 1 to 16")
      ->check(CLI::Range(1, 16));
  app->add_option("--rdma-devices", o->rdma_devices,
                  "Only these RDMA devices of this host, e.g. mlx5_0,mlx5_1");
  app->add_option("--compression", o->compression, "none, lz4, zstd or auto (TCP)");
  app->add_option("--glue", o->glue, "The plug-in's socket, if it is not found by itself");
  app->add_option("--dirty-log", o->dirty_log, "auto, uffd-async or uffd-handler");
  app->add_flag("--wait", o->wait, "Return when all memory was copied once");
}

CLI::App* AddBenchLink(CLI::App* app, BenchLinkCommand* o) {
  CLI::App* bench = app->add_subcommand("bench", "Measure presync's own parts; needs no presyncd");
  bench->require_subcommand(1);
  CLI::App* link = bench->add_subcommand(
      "link",
      "How fast is the page link? Without HOST: the server, which ends with its first client. With "
      "HOST: measure the link to the server there, as ib_write_bw does");
  link->add_option("host", o->peer, "HOST or HOST:PORT of the server");
  link->add_flag("--json", o->json, "Print JSON");
  link->add_option("-p,--port", o->port, "The server's port")->capture_default_str();
  link->add_option("--listen", o->listen, "Server: only on this address");
  link->add_flag("--keep", o->keep, "Server: serve until interrupted");
  link->add_option("--memory", o->memory,
                   "Memory that is written to; server: the most it gives away (256M; server: 4G)");
  link->add_option("--folder", o->folder, "Where that memory is: on tmpfs or hugetlbfs")
      ->capture_default_str();
  link->add_option("--transport", o->transport, "auto, rdma or tcp")
      ->capture_default_str()
      ->check(CLI::IsMember({"auto", "rdma", "tcp"}));
  link->add_option("-s,--size", o->size, "Bytes of a message, 4K to 4M")->capture_default_str();
  link->add_flag("-a,--all", o->all_sizes, "All sizes from 4K to 4M");
  link->add_option("--pattern", o->pattern,
                   "contiguous: messages follow each other in memory; scattered: they lie apart")
      ->capture_default_str()
      ->check(CLI::IsMember({"contiguous", "scattered"}));
  link->add_option("-t,--depth", o->depth, "Messages under way at a time")
      ->capture_default_str()
      ->check(CLI::Range(1u, 65536u));
  link->add_option("-n,--iterations", o->iterations, "Messages of each size (else: --duration)");
  link->add_option("-D,--duration", o->duration, "Time for each size")->capture_default_str();
  link->add_option("--tcp-streams", o->tcp_streams, "Connections of the TCP link")
      ->capture_default_str()
      ->check(CLI::Range(1u, 64u));
  link->add_option("-q,--queue-pairs", o->queue_pairs, "Queue pairs on each RDMA device")
      ->capture_default_str()
      ->check(CLI::Range(1u, kMaxRdmaQueuePairs));
  link->add_option("-d,--devices", o->devices, "RDMA devices of this host to use (else any)")
      ->delimiter(',');
  link->add_option("--max-write", o->max_write,
                   "Longest single RDMA write: neighbouring messages are joined up to it (1M)");
  return link;
}

void AddRecord(CLI::App* app, Options* o) {
  app->add_option("name", o->name, "A guest that presyncd keeps in sync; with --qmp any name")
      ->required();
  app->add_option("--out", o->record.out, "The trace file; compressed if it ends in .zst")
      ->required();
  app->add_option("--qmp", o->qmp,
                  "Open the guest behind this monitor without presyncd, which must not have it "
                  "(needs root)");
  app->add_option("--glue", o->glue, "With --qmp: the plug-in's socket, if it is not found");
  app->add_option("--seconds", o->record.seconds, "How long (default: until Ctrl-C)")
      ->check(CLI::Range(0.1, 1e6));
  app->add_option("--interval", o->record.interval, "Time between two scans, 10ms to 60s")
      ->capture_default_str();
}

int Record(const Options& options) {
  RecordOptions record = options.record;
  record.name = options.name;
  record.qmp = options.qmp;
  record.glue = options.glue;
  record.socket = options.socket;
  record.json = options.json;
  ::signal(SIGTERM, [](int) { interrupted = true; });  // the file is to be whole then, too
  return RunRecord(record, &interrupted);
}

void AddReplay(CLI::App* app, ReplayCommand* r) {
  app->add_option("--trace", r->traces, "Trace files, plain or zstd-compressed")->required();
  app->add_option("--policy", r->policies,
                  "every-scan, once-a-second, skip-if-dirty, oldest, ewma, learned, optimum or all")
      ->required()
      ->delimiter(',');
  auto* set_point = app->add_option("--set-point", r->set_points, "Stale pages to hold at most")
                        ->delimiter(',')
                        ->check(CLI::NonNegativeNumber);
  app->add_option("--max-launch-time", r->max_launch_time,
                  "Instead: what a launch may take, e.g. 100ms; needs --link")
      ->excludes(set_point);
  app->add_option("--link", r->link,
                  "The link's goodput, e.g. 1Gbit: limits each scan, and predicts launch times");
  r->fixed_cost = "45ms";
  app->add_option("--fixed-cost", r->fixed_cost, "What a launch takes besides moving memory")
      ->capture_default_str();
  app->add_option("--back-off", r->max_back_off_log2,
                  "Arming back-off of up to 2^this scans; 0 is off")
      ->capture_default_str()
      ->check(CLI::Range(0, 5));
}

int Main(int argc, char** argv) {
  CLI::App app{
      "presync keeps a running guest's memory mirrored on another host, and launches it there.\n"
      "Exit codes: 0 done, 1 refused or failed (the text says where the guest is), 2 wrong usage, "
      "3 "
      "presyncd can't be reached."};
  Options options;
  app.add_option("--socket", options.socket, "presyncd's socket")->capture_default_str();
  app.set_version_flag("--version", "presync " PRESYNC_VERSION);
  app.require_subcommand(1);
  app.fallthrough();
  const auto add = [&](const char* name, const char* what) {
    CLI::App* sub = app.add_subcommand(name, what);
    sub->add_flag("--json", options.json, "Print JSON");
    return sub;
  };
  CLI::App* start = add("start", "Begin to keep a guest in sync with another host");
  AddStart(start, &options);
  CLI::App* status = add("status", "Show guests that are kept in sync, and those mirrored here");
  status->add_option("name", options.name, "Only this guest");
  status->add_flag("--watch", options.watch, "Show it again and again, until Ctrl-C");
  status->add_option("--interval", options.interval_s, "Seconds between two looks")
      ->capture_default_str()
      ->check(CLI::Range(0.1, 3600.0));
  CLI::App* launch = add("launch", "Run a guest on the host it was kept in sync with");
  launch->add_option("name", options.name, "The guest's name")->required();
  launch->add_flag("--verify", options.verify,
                   "Compare all memory by hashes before the target may run it (costs downtime)");
  launch->add_flag("--wait", options.wait, "Wait for the first full sync");
  CLI::App* stop = add("stop", "End a sync; the guest goes on here");
  stop->add_option("name", options.name, "The guest's name")->required();
  CLI::App* settle =
      add("settle", "Say where a guest runs whose handover only a person can settle");
  settle->add_option("name", options.name, "The guest's name, as presync status shows it")
      ->required();
  settle
      ->add_option("where", options.where,
                   "here: it certainly does not run on the other host, and goes on here; there: it "
                   "runs on the other host; forget: the record says nothing useful any more")
      ->required()
      ->check(CLI::IsMember({"here", "there", "forget"}));
  CLI::App* record = add("record", "Write down which pages a guest writes, for presync replay");
  AddRecord(record, &options);
  CLI::App* replay = add("replay", "Play recorded traces through the policies, off line");
  ReplayCommand replay_command;
  AddReplay(replay, &replay_command);
  CLI::App* doctor = add("doctor", "Look whether this host, and a guest, are ready");
  doctor->add_option("--qmp", options.qmp, "Also look at the QEMU behind this monitor");
  doctor->add_option("--glue", options.glue, "The plug-in's socket, if it is not found by itself");
  BenchLinkCommand bench_link;
  CLI::App* link = AddBenchLink(&app, &bench_link);
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    const int code = app.exit(error);
    return code == 0 ? kOk : kUsage;
  }
  ::signal(SIGINT, [](int) { interrupted = true; });

  if (link->parsed()) return RunBenchLink(bench_link);
  if (start->parsed()) return Start(options);
  if (status->parsed()) return Status(options);
  if (launch->parsed()) return Launch(options);
  if (stop->parsed()) return Stop(options);
  if (settle->parsed()) return Settle(options);
  if (record->parsed()) return Record(options);
  if (replay->parsed()) {
    replay_command.json = options.json;
    return RunReplay(replay_command);
  }
  return RunDoctor(
      {.qmp = options.qmp, .glue = options.glue, .json = options.json, .socket = options.socket});
}

}  // namespace
}  // namespace presync

int main(int argc, char** argv) { return presync::Main(argc, argv); }
