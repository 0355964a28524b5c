#include "tools/presync/may_start.h"

#include <unistd.h>

#include <cstdio>
#include <filesystem>
#include <memory>
#include <string>

#include "absl/strings/str_cat.h"
#include "tools/presyncd/config.h"
#include "transport/sync/departures.h"

namespace presync {
namespace {

// Where a host has no configuration presyncd never ran with another folder.
absl::StatusOr<std::string> StateFolder(const std::string& config_path) {
  const absl::StatusOr<Config> config = LoadConfig(config_path);
  if (absl::IsNotFound(config.status())) return Config().state_folder;
  if (!config.ok()) return config.status();
  return config->state_folder;
}

// Asks the files, not presyncd: a guest may be started before presyncd is, and a presyncd that does
// not run is no reason to start it. What can't be read is a no.
absl::Status MayStart(const std::string& config_path, const std::string& guest, bool clear) {
  const absl::StatusOr<std::string> folder = StateFolder(config_path);
  if (!folder.ok()) return folder.status();
  std::error_code error;
  if (!std::filesystem::exists(*folder, error) && !error) return absl::OkStatus();
  if (::access(folder->c_str(), R_OK | X_OK) != 0) {
    return absl::PermissionDeniedError(
        absl::StrCat("whether ", guest, " may be started is written in ", *folder,
                     ", which this user can't read: ask as root (in a unit: ExecCondition=+...)"));
  }
  if (clear) {
    if (absl::Status s = ForgetDeparture(*folder, guest); !s.ok()) return s;
  }
  return CheckMayStart(*folder, guest);
}

}  // namespace

RunCommand AddMayStart(CLI::App* app, CommandContext* context) {
  struct Options {
    std::string name;
    std::string config = kDefaultConfigPath;
    bool incoming = false;
    bool clear = false;
  };
  auto o = std::make_shared<Options>();
  app->footer(
      "Exit code 0: it may; 1: it must not, with the reason. In the unit that starts the guest:\n"
      "  ExecCondition=+/usr/bin/presync may-start NAME");
  app->add_option("name", o->name, "The guest's name, as presync start had it")->required();
  app->add_option("-c,--config", o->config, "presyncd's configuration")->capture_default_str();
  app->add_flag("--incoming", o->incoming,
                "It is a QEMU that waits for the guest (-incoming): that may always be started");
  app->add_flag("--clear", o->clear,
                "The guest certainly runs nowhere else: forget that it left this host");
  return [o, context] {
    if (o->incoming) return static_cast<int>(kOk);
    if (absl::Status s = MayStart(o->config, o->name, o->clear); !s.ok()) return Fail(s, *context);
    if (context->json) std::printf("{\"ok\":true}\n");
    return static_cast<int>(kOk);
  };
}

}  // namespace presync
