#include "tools/presync/render.h"

#include <unistd.h>

#include <cstdio>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "predictor/page.h"
#include "tools/common/local_api.h"
#include "tools/common/units.h"

namespace presync {
namespace {

using Json = nlohmann::json;

double Real(const Json& object, const char* key, double fallback = 0) {
  const auto it = object.find(key);
  return it != object.end() && it->is_number() ? it->get<double>() : fallback;
}

std::string Millis(const Json& object, const char* key) {
  const auto it = object.find(key);
  return it != object.end() && it->is_number() ? absl::StrFormat("%.0f ms", it->get<double>())
                                               : "?";
}

std::string Pages(const Json& object, const char* key) {
  return FormatBytes(PagesToBytes(static_cast<PageCount>(NumberOr(object, key, 0))));
}

std::string Rate(const Json& object, const char* key) {
  const int64_t rate = NumberOr(object, key, 0);
  return rate > 0 ? FormatRate(static_cast<uint64_t>(rate)) : "?";
}

}  // namespace

std::string RenderGuestLine(const Json& guest) {
  return absl::StrFormat(
      "%s %s: launch now = %s, %s left, %s on the wire, guest writes %.0f pages/s",
      TextOr(guest, "name", "?"), TextOr(guest, "state", "?"), Millis(guest, "predicted_launch_ms"),
      Pages(guest, "residual_pages"),
      FormatRate(static_cast<uint64_t>(NumberOr(guest, "rate_bytes_per_s", 0))),
      Real(guest, "dirty_pages_per_s"));
}

std::string RenderGuest(const Json& guest) {
  std::string text = absl::StrFormat("%s -> %s  %s", TextOr(guest, "name", "?"),
                                     TextOr(guest, "to", "?"), TextOr(guest, "state", "?"));
  const std::string link = TextOr(guest, "link", "");
  if (!link.empty()) absl::StrAppend(&text, " over ", link);
  std::vector<std::string> devices;
  for (const Json& device : guest.value("link_devices", Json::array())) {
    if (device.is_string()) devices.push_back(device.get<std::string>());
  }
  if (!devices.empty()) absl::StrAppend(&text, " (", absl::StrJoin(devices, ", "), ")");
  absl::StrAppendFormat(&text, "\n  launch now = %s (promised %s), %s left of %s, set-point %s\n",
                        Millis(guest, "predicted_launch_ms"), Millis(guest, "max_launch_ms"),
                        Pages(guest, "residual_pages"), Pages(guest, "pages"),
                        Pages(guest, "set_point_pages"));
  absl::StrAppendFormat(
      &text, "  wire %s now, %s so far; link %s; guest writes %.0f pages/s; dirty log %s",
      FormatRate(static_cast<uint64_t>(NumberOr(guest, "rate_bytes_per_s", 0))),
      FormatBytes(static_cast<uint64_t>(NumberOr(guest, "wire_bytes", 0))),
      Rate(guest, "link_bytes_per_s"), Real(guest, "dirty_pages_per_s"),
      TextOr(guest, "dirty_log", "?"));
  const std::string reason = TextOr(guest, "link_reason", "");
  if (!reason.empty()) absl::StrAppend(&text, "\n  link: ", reason);
  const std::string problem = TextOr(guest, "problem", "");
  if (!problem.empty()) absl::StrAppend(&text, "\n  ! ", problem);
  return text;
}

std::string RenderStatus(const Json& status) {
  std::string text;
  const std::string warning = TextOr(status.value("security", Json::object()), "warning", "");
  for (const Json& guest : status.value("guests", Json::array())) {
    absl::StrAppend(&text, RenderGuest(guest), "\n");
  }
  for (const Json& guest : status.value("incoming", Json::array())) {
    absl::StrAppend(&text, TextOr(guest, "name", "?"), " <- ", TextOr(guest, "from", "?"), "  ",
                    TextOr(guest, "state", "?"), "\n");
  }
  for (const Json& matter : status.value("open", Json::array())) {
    if (matter.is_string()) absl::StrAppend(&text, "! ", matter.get<std::string>(), "\n");
  }
  if (text.empty()) text = "no guest is kept in sync from or to this host\n";
  text.pop_back();
  return warning.empty() ? text : absl::StrCat("! ", warning, "\n", text);
}

std::string RenderLaunch(const Json& report) {
  std::string text = absl::StrFormat(
      "%s runs on %s: launch %.1f ms, guest stopped for %.1f ms\n"
      "  %s were left at the order, %s when it stopped; %s sent after the order, %s before",
      TextOr(report, "name", "?"), TextOr(report, "to", "?"), Real(report, "launch_ms"),
      Real(report, "downtime_ms"), Pages(report, "residual_pages"),
      Pages(report, "residual_pages_at_stop"),
      FormatBytes(static_cast<uint64_t>(NumberOr(report, "bytes_after_launch", 0))),
      FormatBytes(static_cast<uint64_t>(NumberOr(report, "bytes_before_launch", 0))));
  if (const int64_t compared = NumberOr(report, "pages_compared", 0); compared > 0) {
    absl::StrAppendFormat(&text, "\n  %d pages compared by hash, %d differ", compared,
                          NumberOr(report, "pages_differing", 0));
  }
  absl::StrAppend(&text, "\n ");
  for (const Json& step : report.value("steps", Json::array())) {
    absl::StrAppendFormat(&text, " %s %.1f;", TextOr(step, "step", "?"), Real(step, "ms"));
  }
  text.back() = ' ';
  return absl::StrCat(text, "(ms)");
}

std::string RenderSettled(const Json&) { return "settled; presync status shows what is left"; }

std::string RenderStopped(const Json&) { return "stopped; the guest goes on here"; }

void ShowProgress(const std::string& line, bool last) {
  const bool terminal = ::isatty(STDOUT_FILENO) != 0;
  if (terminal) std::printf("\r\033[K%s%s", line.c_str(), last ? "\n" : "");
  std::fflush(stdout);
}

void ClearScreen() {
  if (::isatty(STDOUT_FILENO) != 0) std::printf("\033[H\033[2J");
}

}  // namespace presync
