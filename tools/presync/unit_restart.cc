#include "tools/presync/unit_restart.h"

#include <cstdio>
#include <fstream>
#include <iterator>
#include <vector>

#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"

namespace presync {
namespace {

std::string Property(const std::string& properties, const std::string& name) {
  for (const absl::string_view line : absl::StrSplit(properties, '\n')) {
    if (absl::StartsWith(line, name + "=")) return std::string(line.substr(name.size() + 1));
  }
  return "";
}

// A unit's name goes into a shell's command.
bool IsPlain(const std::string& unit) {
  for (const char c : unit) {
    const bool plain = absl::ascii_isalnum(static_cast<unsigned char>(c)) || c == '-' || c == '_' ||
                       c == '.' || c == '@' || c == ':';
    if (!plain) return false;
  }
  return !unit.empty() && unit[0] != '-';
}

}  // namespace

std::string UnitOf(const std::string& cgroup) {
  for (const absl::string_view line : absl::StrSplit(cgroup, '\n')) {
    if (!absl::StartsWith(line, "0::")) continue;
    for (const absl::string_view part : absl::StrSplit(line.substr(3), '/')) {
      if (absl::EndsWith(part, ".service")) return std::string(part);
    }
  }
  return "";
}

Finding JudgeUnit(const std::string& unit, const std::string& properties) {
  const std::string restart = Property(properties, "Restart");
  if (restart.empty() || restart == "no") {
    return Good("restart", absl::StrCat(unit, " does not start it again when it ends"));
  }
  const std::string says = absl::StrCat(unit, " has Restart=", restart);
  if (absl::StrContains(Property(properties, "ExecCondition"), "may-start")) {
    return Good("restart", says + ", and asks presync may-start first");
  }
  return Bad("restart",
             says + ": after a move it would start the guest again here, and two would run",
             absl::StrCat("ExecCondition=+/usr/bin/presync may-start NAME in [Service] of ", unit,
                          " (systemctl edit ", unit, "), or Restart=no"));
}

std::optional<Finding> ExamineRestart(int pid) {
  std::ifstream file(absl::StrCat("/proc/", pid, "/cgroup"));
  const std::string cgroup((std::istreambuf_iterator<char>(file)),
                           std::istreambuf_iterator<char>());
  const std::string unit = UnitOf(cgroup);
  if (!IsPlain(unit)) return std::nullopt;
  const std::string command =
      absl::StrCat("systemctl show -p Restart -p ExecCondition -- ", unit, " 2>/dev/null");
  FILE* const answer = ::popen(command.c_str(), "re");
  if (answer == nullptr) return std::nullopt;
  std::string properties;
  std::vector<char> buffer(4096);
  while (const size_t n = std::fread(buffer.data(), 1, buffer.size(), answer)) {
    properties.append(buffer.data(), n);
  }
  if (::pclose(answer) != 0) return std::nullopt;
  return JudgeUnit(unit, properties);
}

}  // namespace presync
