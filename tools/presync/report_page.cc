#include "tools/presync/report_page.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "predictor/page.h"
#include "tools/common/local_api.h"
#include "tools/common/units.h"
#include "tools/presync/svg_chart.h"

namespace presync {
namespace {

using Json = nlohmann::json;

constexpr double kUnknown = std::numeric_limits<double>::quiet_NaN();
constexpr char kStyle[] =
    "body{font:15px/1.5 system-ui,sans-serif;max-width:920px;margin:2em auto;padding:0 1em;"
    "color:#222}h1{font-size:1.6em;margin-bottom:0}h2{font-size:1.2em;margin:2em 0 .2em}"
    ".lead{font-size:1.15em}.sub{color:#666;margin:.2em 0}.bad{color:#c00;font-weight:bold}"
    ".good{color:#0b6e4f;font-weight:bold}"
    "table{border-collapse:collapse;width:100%;font-size:13px}"
    "td,th{padding:3px 8px;border-bottom:1px solid #ddd;text-align:left;font-weight:normal}"
    "th{color:#666;width:30%}";

double Real(const Json& object, const char* key, double fallback = kUnknown) {
  const auto it = object.find(key);
  return it != object.end() && it->is_number() ? it->get<double>() : fallback;
}

Json Array(const Json& object, const char* key) {
  const auto it = object.find(key);
  return it != object.end() && it->is_array() ? *it : Json::array();
}

double Megabytes(double pages) { return pages * static_cast<double>(PagesToBytes(1)) / 1e6; }

std::string Ms(double ms) { return std::isnan(ms) ? "not known" : absl::StrFormat("%.0f ms", ms); }

std::string When(double unix_seconds) {
  if (std::isnan(unix_seconds)) return "?";
  return absl::FormatTime("%Y-%m-%d %H:%M:%S %Z", absl::UnixEpoch() + absl::Seconds(unix_seconds),
                          absl::LocalTimeZone());
}

std::string Row(const char* what, const std::string& value) {
  return absl::StrCat("<tr><th>", what, "<td>", EscapeHtml(value));
}

// Seconds, minutes or hours, so that the axis has numbers a person can read.
struct TimeUnit {
  double seconds = 1;
  const char* label = "seconds since the sync was started";
};

TimeUnit UnitFor(double seconds) {
  if (seconds > 3 * 3600) return {3600, "hours since the sync was started"};
  if (seconds > 600) return {60, "minutes since the sync was started"};
  return {};
}

// All that is drawn over the time of the sync.
struct Curves {
  TimeUnit unit;
  ChartLine residual = {"left to move", {}};
  ChartLine set_point = {"set-point: what the promise leaves room for", {}};
  ChartLine wire = {"on the wire", {}};
  ChartLine written = {"written by the guest", {}};
  ChartLine forecast = {"a launch at that moment", {}};
  std::vector<std::pair<double, std::string>> marks;  // launches, and changes of the link
};

Curves MakeCurves(const Json& report) {
  const Json samples = Array(report, "samples");
  Curves curves;
  const double end = samples.empty() ? 0 : Real(samples.back(), "t", 0);
  curves.unit = UnitFor(end);
  double last_t = kUnknown, last_wire = 0;
  std::string last_link;
  for (const Json& sample : samples) {
    const double t = Real(sample, "t", 0);
    const double at = t / curves.unit.seconds;
    const double wire = Real(sample, "wire_bytes", 0);
    curves.residual.points.emplace_back(at, Megabytes(Real(sample, "residual_pages")));
    curves.set_point.points.emplace_back(at, Megabytes(Real(sample, "set_point_pages")));
    curves.written.points.emplace_back(at, Megabytes(Real(sample, "dirty_pages_per_s")));
    curves.forecast.points.emplace_back(at, Real(sample, "predicted_launch_ms"));
    if (t - last_t > 0.2) {  // not of two looks at the same moment
      curves.wire.points.emplace_back(at, std::max(0.0, wire - last_wire) / 1e6 / (t - last_t));
    }
    if (!(t - last_t <= 0.2)) {
      last_t = t;
      last_wire = wire;
    }
    const std::string link = TextOr(sample, "link", "");
    if (!link.empty() && link != last_link) {
      if (!last_link.empty()) curves.marks.emplace_back(at, absl::StrCat("over ", link));
      last_link = link;
    }
  }
  const double since = Real(report, "since", 0);
  for (const Json& launch : Array(report, "launches")) {
    const double t = Real(launch, "ordered_at", 0) - since;
    if (t >= 0 && t <= end + 1) curves.marks.emplace_back(t / curves.unit.seconds, "launch");
  }
  return curves;
}

// After a move there is none any more.
std::string Link(const Json& report) {
  std::string link = TextOr(report, "link", "");
  if (link.empty()) link = "none any more";
  if (const std::string why = TextOr(report, "link_reason", ""); !why.empty()) {
    absl::StrAppend(&link, "; ", why);
  }
  return absl::StrCat(link, "; reconnects: ", NumberOr(report, "reconnects", 0));
}

std::string Summary(const Json& report) {
  const double memory = Megabytes(Real(report, "pages"));
  std::string html = "<table>";
  absl::StrAppend(
      &html, Row("state", TextOr(report, "state", "?")),
      Row("memory", absl::StrFormat("%.0f MB", memory)),
      Row("promise, fixed cost of a launch",
          absl::StrCat(Ms(Real(report, "max_launch_ms")), ", ", Ms(Real(report, "fixed_cost_ms")))),
      Row("link", Link(report)),
      Row("sent so far",
          absl::StrFormat("%.1f MB (%.2f times the memory)", Real(report, "wire_bytes", 0) / 1e6,
                          Real(report, "wire_bytes", 0) / 1e6 / memory)),
      Row("write faults caused in the guest",
          absl::StrCat(NumberOr(report, "write_faults", 0), ", dirty log ",
                       TextOr(report, "dirty_log", "?"))));
  const std::string problem = TextOr(report, "problem", "");
  if (!problem.empty()) absl::StrAppend(&html, Row("problem", problem));
  return absl::StrCat(html, "</table>");
}

Timeline MakeTimeline(const Json& launch) {
  Timeline timeline;
  timeline.x_label = "ms since the order";
  double from = 0;
  for (const Json& step : Array(launch, "steps")) {
    const double to = Real(step, "ms", from);
    timeline.bars.push_back({TextOr(step, "step", "?"), from, to});
    from = to;
  }
  timeline.shaded_to = Real(launch, "launch_ms", 0);
  timeline.shaded_from = timeline.shaded_to - Real(launch, "downtime_ms", 0);
  timeline.shaded_words = "guest stopped";
  const double promised = Real(launch, "promised_ms");
  if (!std::isnan(promised)) timeline.goal = {promised, "promised"};
  return timeline;
}

std::string OneLaunch(const Json& launch) {
  std::string html = absl::StrCat("<h2>Launch of ", When(Real(launch, "ordered_at")), "</h2>");
  const std::string error = TextOr(launch, "error", "");
  if (!error.empty()) return absl::StrCat(html, "<p class='bad'>Failed: ", EscapeHtml(error));
  const double ms = Real(launch, "launch_ms"), promised = Real(launch, "promised_ms");
  absl::StrAppendFormat(
      &html,
      "<p><span class='%s'>%.1f ms</span> from the order to the guest running on %s (promised %s); "
      "it stood still for %.1f ms. %.1f MB were left at the order, %.1f MB when it stopped. "
      "Each step, in ms:</p>",
      ms <= promised ? "good" : "bad", ms, EscapeHtml(TextOr(launch, "to", "?")), Ms(promised),
      Real(launch, "downtime_ms"), Megabytes(Real(launch, "residual_pages")),
      Megabytes(Real(launch, "residual_pages_at_stop")));
  return absl::StrCat(html, RenderTimeline(MakeTimeline(launch)));
}

}  // namespace

std::string RenderReportPage(const Json& report, absl::Time made_at) {
  const std::string name = EscapeHtml(TextOr(report, "name", "?"));
  const Curves curves = MakeCurves(report);
  const double promise = Real(report, "max_launch_ms");
  std::string html = absl::StrCat(
      "<!doctype html><html lang='en'><head><meta charset='utf-8'><title>presync: ", name,
      "</title><link rel='icon' href='data:,'><style>", kStyle, kChartStyle,
      "</style></head><body>", "<h1>", name, " &rarr; ", EscapeHtml(TextOr(report, "to", "?")),
      "</h1><p class='sub'>sync since ", When(Real(report, "since")), "; this page was made ",
      absl::FormatTime("%Y-%m-%d %H:%M:%S %Z", made_at, absl::LocalTimeZone()), "</p>",
      Summary(report));
  Chart residual = {.y_label = "MB", .x_label = curves.unit.label};
  residual.lines = {curves.residual, curves.set_point};
  residual.marks = curves.marks;
  Chart rate = {.y_label = "MB/s", .x_label = curves.unit.label};
  rate.lines = {curves.wire, curves.written};
  rate.marks = curves.marks;
  Chart forecast = {.y_label = "ms", .x_label = curves.unit.label, .log_y = true};
  forecast.lines = {curves.forecast};
  forecast.marks = curves.marks;
  if (!std::isnan(promise)) {
    forecast.goal = {promise, absl::StrCat("promised: ", Ms(promise))};
  }
  absl::StrAppend(&html, "<h2>What a launch would have taken</h2>", RenderChart(forecast),
                  "<h2>What was left to move</h2>", RenderChart(residual), "<h2>Rates</h2>",
                  RenderChart(rate));
  const Json launches = Array(report, "launches");
  if (launches.empty()) absl::StrAppend(&html, "<h2>Launches</h2><p>None yet.</p>");
  for (auto it = launches.rbegin(); it != launches.rend(); ++it) {
    absl::StrAppend(&html, OneLaunch(*it));
  }
  return absl::StrCat(html, "</body></html>\n");
}

}  // namespace presync
