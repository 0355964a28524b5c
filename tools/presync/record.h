// `presync record`: which pages a live guest writes, scan by scan, into a trace file.
#pragma once

#include <atomic>
#include <string>

#include "tools/presync/command.h"

namespace presync {

struct RecordOptions {
  std::string name;    // of a guest that presyncd keeps in sync; with `qmp` for texts only
  std::string out;     // compressed if it ends in .zst
  std::string qmp;     // not empty: open this guest here, without presyncd
  std::string glue;    // as in OpenGuestOptions
  std::string socket;  // presyncd's
  double seconds = 0;  // 0: until interrupted
  std::string interval = "100ms";
  bool json = false;
};

// Records until the time is over, `*interrupted`, or the guest ends; the file is whole in each of
// these. Returns presync's exit code: 1 after an error, which was said, 3 if presyncd can't be
// reached.
int RunRecord(const RecordOptions& options, const std::atomic<bool>* interrupted);

RunCommand AddRecord(CLI::App* app, CommandContext* context);

}  // namespace presync
