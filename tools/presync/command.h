// What the subcommands of `presync` share. main.cc has the table of them; each stands in a file of
// its own, options included.
#pragma once

#include <CLI/CLI.hpp>
#include <atomic>
#include <functional>
#include <nlohmann/json.hpp>
#include <string>

#include "absl/status/status.h"
#include "absl/time/time.h"

namespace presync {

// As in the help text.
enum ExitCode { kOk = 0, kFailed = 1, kUsage = 2, kNoDaemon = 3, kInterrupted = 130 };

// What every subcommand has. Outlives them.
struct CommandContext {
  std::string socket;  // presyncd's
  bool json = false;
  std::atomic<bool> interrupted = false;  // by Ctrl-C
};

// Does what the command line asked for and returns the exit code.
using RunCommand = std::function<int()>;

// Adds a subcommand's options to `app`, which has --json already. The result is called, if the
// subcommand was given, after the command line was read.
using AddCommand = RunCommand (*)(CLI::App* app, CommandContext* context);

// Says what went wrong, on stderr and with --json on stdout too; returns `code`.
int Fail(const absl::Status& status, const CommandContext& context, ExitCode code = kFailed);

// presyncd's answer, or the exit code after saying what went wrong.
struct Answer {
  nlohmann::json json;
  int exit_code = kOk;
};
// Ctrl-C ends the waiting, if `goes_on` is not empty: a sentence that says what presyncd goes on
// with, and how to stop that.
Answer Ask(const CommandContext& context, const nlohmann::json& request, absl::Duration longest,
           const std::string& goes_on = "");

// Says that Ctrl-C ended the waiting, and what goes on.
int Interrupted(const std::string& goes_on, const CommandContext& context);

// Prints an answer as JSON or as `render` has it. Returns the exit code.
int Print(const Answer& answer, const CommandContext& context,
          std::string (*render)(const nlohmann::json&));

// presyncd opens the paths that it is told, from a folder of its own. Empty stays empty.
std::string AbsolutePath(const std::string& path);

}  // namespace presync
