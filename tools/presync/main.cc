// presync: what a person types. Talks to the presyncd of this host.
#include <signal.h>

#include <utility>
#include <vector>

#include "tools/presync/bench.h"
#include "tools/presync/command.h"
#include "tools/presync/doctor.h"
#include "tools/presync/libvirt_commands.h"
#include "tools/presync/may_start.h"
#include "tools/presync/record.h"
#include "tools/presync/replay.h"
#include "tools/presync/report.h"
#include "tools/presync/sync_commands.h"
#include "tools/presyncd/config.h"

namespace presync {
namespace {

struct Subcommand {
  const char* name;
  const char* what;
  AddCommand add;
};

constexpr Subcommand kSubcommands[] = {
    {"start", "Begin to keep a guest in sync with another host", AddStart},
    {"status", "Show guests that are kept in sync, and those mirrored here", AddStatus},
    {"launch", "Run a guest on the host it was kept in sync with", AddLaunch},
    {"verify", "Compare a guest with its copy by hash, while it runs", AddVerify},
    {"stop", "End a sync; the guest goes on here", AddStop},
    {"settle", "Say where a guest runs whose handover only a person can settle", AddSettle},
    {"may-start", "Whether a guest may be started here, or has moved away", AddMayStart},
    {"report", "Make a page of a guest's sync and launches, with plots", AddReport},
    {"record", "Write down which pages a guest writes, for presync replay", AddRecord},
    {"replay", "Play recorded traces through the policies, off line", AddReplay},
    {"libvirt", "Ready libvirt's domains for presync", AddLibvirt},
    {"doctor", "Look whether this host, and a guest, are ready", AddDoctor},
    {"bench", "Measure presync's own parts; needs no presyncd", AddBench},
};

CommandContext context;  // a signal handler's, too

int Main(int argc, char** argv) {
  CLI::App app{
      "presync keeps a running guest's memory mirrored on another host, and launches it there.\n"
      "Exit codes: 0 done, 1 refused or failed (the text says where the guest is) or, of verify, "
      "pages differ, 2 wrong usage, 3 presyncd can't be reached, 130 Ctrl-C ended the waiting (the "
      "text says what goes on)."};
  context.socket = kDefaultSocketPath;
  app.add_option("--socket", context.socket, "presyncd's socket")->capture_default_str();
  app.set_version_flag("--version", "presync " PRESYNC_VERSION);
  app.require_subcommand(1);
  app.fallthrough();
  std::vector<std::pair<CLI::App*, RunCommand>> commands;
  for (const Subcommand& subcommand : kSubcommands) {
    CLI::App* sub = app.add_subcommand(subcommand.name, subcommand.what);
    sub->add_flag("--json", context.json, "Print JSON");
    commands.emplace_back(sub, subcommand.add(sub, &context));
  }
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    return app.exit(error) == 0 ? kOk : kUsage;
  }
  ::signal(SIGINT, [](int) { context.interrupted = true; });
  for (const auto& [sub, run] : commands) {
    if (sub->parsed()) return run();
  }
  return kUsage;  // require_subcommand lets nobody get here
}

}  // namespace
}  // namespace presync

int main(int argc, char** argv) { return presync::Main(argc, argv); }
