// `presync doctor`: is this host, and a guest, ready? Each finding comes with its remedy.
#pragma once

#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "tools/presync/command.h"

namespace presync {

struct DoctorOptions {
  std::string qmp;     // a guest's monitor; empty: only the host
  std::string glue;    // the plug-in's socket; empty: found by itself
  std::string domain;  // of libvirt; empty: none
  bool json = false;
  std::string socket;  // presyncd's
};

struct Finding {
  enum class Level { kGood, kNote, kProblem };
  Level level = Level::kGood;
  std::string what;    // what was looked at
  std::string detail;  // what was found
  std::string remedy;  // what to do; empty if nothing is to do
};
Finding Good(std::string what, std::string detail);
Finding Note(std::string what, std::string detail, std::string remedy);
Finding Bad(std::string what, std::string detail, std::string remedy);

// Looks at this host. Reads only.
std::vector<Finding> ExamineHost(const std::string& socket);
// Looks at the guest behind a monitor; tries its dirty logs, which touches none of its memory.
std::vector<Finding> ExamineGuest(const std::string& qmp, const std::string& glue);

// Looks whether libvirt here is ready for presync, if presyncd's configuration has [libvirt]; and
// at a domain, if `domain` is not empty. "doctor_libvirt.cc".
std::vector<Finding> ExamineLibvirt(const std::string& socket, const std::string& domain);

// The first half of that: this host. `host` is presyncd's answer to "libvirt".
std::vector<Finding> ExamineLibvirtHost(const nlohmann::json& host);

// "problem  hook   what was found", and below it what to do.
std::string FindingText(const Finding& finding);

// Prints the findings. 0 if there is no problem, 1 otherwise.
int RunDoctor(const DoctorOptions& options);

RunCommand AddDoctor(CLI::App* app, CommandContext* context);

}  // namespace presync
