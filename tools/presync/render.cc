#include "tools/presync/render.h"

#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <iterator>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "absl/time/time.h"
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

// What a launch would take now. A sync that is over promises nothing, nor one whose guest can't be
// launched as it is.
std::string LaunchNow(const Json& guest) {
  static constexpr const char* kGoesOn[] = {"connecting", "first-pass", "syncing", "launching"};
  const std::string state = TextOr(guest, "state", "");
  const bool over = std::none_of(std::begin(kGoesOn), std::end(kGoesOn),
                                 [&state](const char* each) { return state == each; });
  if (over) return "no launch is possible";
  if (!FlagOr(guest, "launchable", true)) return "can't be launched now, see below";
  return absl::StrCat("launch now = ", Millis(guest, "predicted_launch_ms"));
}

// Nothing before the first audit has ended, unless something was found.
std::string RenderAudit(const Json& guest) {
  std::string text;
  const Json audit = guest.value("audit", Json::object());
  const auto ended = audit.find("ended_at");
  if (ended != audit.end() && ended->is_number()) {
    const absl::Time at = absl::UnixEpoch() + absl::Seconds(ended->get<double>());
    absl::StrAppendFormat(&text, "\n  last audit %s: %d pages compared, %d differed, %d aside",
                          absl::FormatTime("%Y-%m-%d %H:%M:%S", at, absl::LocalTimeZone()),
                          NumberOr(audit, "pages_compared", 0),
                          NumberOr(audit, "pages_differing", 0), NumberOr(audit, "pages_aside", 0));
  }
  if (const int64_t differing = NumberOr(guest, "pages_differing", 0); differing > 0) {
    absl::StrAppendFormat(&text,
                          "\n  ! %d pages differed on the target though nobody was seen to write "
                          "them; they were sent again. Launch with --verify only; see the log",
                          differing);
  }
  return text;
}

// How it went on after its link, or a presyncd, had gone. Nothing if it never had to.
std::string RenderResumption(const Json& guest) {
  if (FlagOr(guest, "proving", false)) {
    return absl::StrFormat(
        "\n  comparing the copy that the target still has: %d of %d pages so far",
        NumberOr(guest, "pages_proven", 0), NumberOr(guest, "pages", 0));
  }
  const Json resumed = guest.value("resumption", Json::object());
  const std::string from = TextOr(resumed, "from", "");
  if (from.empty()) return "";
  const char* how = "all anew";
  if (from == "ledger") how = "where it was";
  if (from == "copy") how = "with the copy that the target still had";
  return absl::StrFormat("\n  went on %s: %s%s sent again, %s of hashes", how,
                         FormatBytes(static_cast<uint64_t>(NumberOr(resumed, "wire_bytes", 0))),
                         FlagOr(resumed, "caught_up", false) ? "" : " so far",
                         FormatBytes(static_cast<uint64_t>(NumberOr(resumed, "hash_bytes", 0))));
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
  absl::StrAppendFormat(&text, "\n  %s (promised %s), %s left of %s, set-point %s\n",
                        LaunchNow(guest), Millis(guest, "max_launch_ms"),
                        Pages(guest, "residual_pages"), Pages(guest, "pages"),
                        Pages(guest, "set_point_pages"));
  absl::StrAppendFormat(
      &text, "  wire %s now, %s so far; link %s; guest writes %.0f pages/s; dirty log %s",
      FormatRate(static_cast<uint64_t>(NumberOr(guest, "rate_bytes_per_s", 0))),
      FormatBytes(static_cast<uint64_t>(NumberOr(guest, "wire_bytes", 0))),
      Rate(guest, "link_bytes_per_s"), Real(guest, "dirty_pages_per_s"),
      TextOr(guest, "dirty_log", "?"));
  absl::StrAppend(&text, RenderResumption(guest), RenderAudit(guest));
  const std::string reason = TextOr(guest, "link_reason", "");
  if (!reason.empty()) absl::StrAppend(&text, "\n  link: ", reason);
  for (const Json& warning : guest.value("warnings", Json::array())) {
    if (warning.is_string()) absl::StrAppend(&text, "\n  ! ", warning.get<std::string>());
  }
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
  if (const int64_t unsettled = NumberOr(report, "unsettled_pages", 0); unsettled > 0) {
    absl::StrAppendFormat(
        &text,
        "\n  %d pages that a disk may have been filling were compared, %d of them "
        "sent again",
        unsettled, NumberOr(report, "unsettled_differing", 0));
  }
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

std::string RenderVerify(const Json& report) {
  const int64_t differing = NumberOr(report, "pages_differing", 0);
  std::string text = absl::StrFormat(
      "%s and its copy on %s: %d pages compared, %s; %d left aside, which were being written or "
      "sent; %s of hashes",
      TextOr(report, "name", "?"), TextOr(report, "to", "?"), NumberOr(report, "pages_compared", 0),
      differing == 0 ? "all equal" : absl::StrCat(differing, " DIFFER"),
      NumberOr(report, "pages_aside", 0),
      FormatBytes(static_cast<uint64_t>(NumberOr(report, "hash_bytes", 0))));
  if (const int64_t repaired = NumberOr(report, "pages_repaired", 0); repaired > 0) {
    absl::StrAppendFormat(&text,
                          "\n  %d of those aside had been changed by a disk's read after they were "
                          "sent: they are sent again, as they would have been at a launch",
                          repaired);
  }
  if (differing == 0) return text;
  std::vector<std::string> pages;
  for (const Json& page : report.value("differing", Json::array())) pages.push_back(page.dump());
  const bool more = static_cast<int64_t>(pages.size()) < differing;
  absl::StrAppend(&text, "\n! pages ", absl::StrJoin(pages, ", "), more ? ", ..." : "",
                  " differ though nobody was seen to write them. They are sent again; until it is "
                  "known why, launch with --verify only. Keep the logs of both presyncd");
  return text;
}

std::string RenderSettled(const Json& answer) {
  return absl::StrCat("settled: ", TextOr(answer, "done", "done"),
                      "; presync status shows what is left");
}

std::string RenderStopped(const Json& answer) {
  const std::string state = TextOr(answer, "state", "stopped");
  const std::string name = TextOr(answer, "name", "the guest");
  const std::string problem = TextOr(answer, "problem", "");
  if (state == "moved") {
    return absl::StrCat(name, " had moved: it runs on ", TextOr(answer, "to", "the other host"),
                        ", not here. Its sync is no longer shown",
                        problem.empty() ? "" : ". ! " + problem);
  }
  if (state == "failed") {
    return absl::StrCat("the sync of ", name, " had ended by itself: ", problem,
                        ". It is no longer shown");
  }
  return "stopped; the guest goes on here";
}

void ShowProgress(const std::string& line, bool last) {
  const bool terminal = ::isatty(STDOUT_FILENO) != 0;
  if (terminal) std::printf("\r\033[K%s%s", line.c_str(), last ? "\n" : "");
  std::fflush(stdout);
}

void ClearScreen() {
  if (::isatty(STDOUT_FILENO) != 0) std::printf("\033[H\033[2J");
}

}  // namespace presync
