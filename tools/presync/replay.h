// presync replay: recorded traces through the policies, off line.
#pragma once

#include <string>
#include <vector>

#include "tools/presync/command.h"

namespace presync {

struct ReplayCommand {
  std::vector<std::string> traces;          // files
  std::vector<std::string> policies;        // names, or "all"
  std::vector<uint32_t> set_points;         // pages; empty: by max_launch_time and link
  std::string max_launch_time, fixed_cost;  // as an operator types them
  std::string link;                         // rate; empty: unknown, no limit
  std::string rates_within = "10s";         // for known-rates
  uint32_t max_back_off_log2 = 5;
  bool json = false;
};

// Prints a table, or JSON. Returns the exit code: 0 done, 1 a trace can't be read, 2 wrong usage;
// the reason goes to stderr.
int RunReplay(const ReplayCommand& command);

RunCommand AddReplay(CLI::App* app, CommandContext* context);

}  // namespace presync
