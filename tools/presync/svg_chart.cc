#include "tools/presync/svg_chart.h"

#include <algorithm>
#include <cmath>
#include <iterator>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_replace.h"

namespace presync {
namespace {

constexpr double kWidth = 880, kHeight = 260, kLeft = 70, kRight = 18, kTop = 18, kBottom = 40;
constexpr double kRow = 24, kNames = 150;  // of a timeline
constexpr const char* kColors[] = {"#0b6e4f", "#c8553d", "#4a6fa5", "#e0a030", "#7d5ba6"};
constexpr size_t kColorCount = std::size(kColors);

std::string Text(double x, double y, const std::string& words, const char* anchor = "middle",
                 const char* extra = "") {
  return absl::StrFormat("<text x='%.1f' y='%.1f' text-anchor='%s' %s>%s</text>", x, y, anchor,
                         extra, EscapeHtml(words));
}

std::string Segment(double x1, double y1, double x2, double y2, const char* style) {
  return absl::StrFormat("<line x1='%.1f' y1='%.1f' x2='%.1f' y2='%.1f' class='%s'/>", x1, y1, x2,
                         y2, style);
}

std::string Open(double height) {
  return absl::StrFormat("<svg viewBox='0 0 %.0f %.0f' role='img'>", kWidth, height);
}

// Round numbers from 0 to `top` or just above it, six at most.
std::vector<double> Ticks(double top) {
  if (top <= 0) return {0, 1};
  const double decade = std::pow(10, std::floor(std::log10(top)));
  double step = decade;
  for (const double part : {0.1, 0.2, 0.5, 1.0}) {
    step = decade * part;
    if (top / step <= 6) break;
  }
  std::vector<double> ticks;
  for (int i = 0; i <= std::ceil(top / step - 1e-9); ++i) ticks.push_back(i * step);
  return ticks;
}

// From values to the places of a drawing.
class Axis {
 public:
  Axis(std::vector<double> ticks, bool log, double from, double to)
      : ticks_(std::move(ticks)), log_(log), from_(from), to_(to) {}
  const std::vector<double>& ticks() const { return ticks_; }
  double Place(double value) const {
    const double low = ticks_.front(), high = ticks_.back();
    const double share =
        log_ ? std::log(value / low) / std::log(high / low) : (value - low) / (high - low);
    return from_ + std::clamp(share, 0.0, 1.0) * (to_ - from_);
  }

 private:
  std::vector<double> ticks_;
  bool log_;
  double from_, to_;
};

std::vector<double> LogTicks(double low, double high) {
  double tick = std::pow(10, std::floor(std::log10(low)));
  std::vector<double> ticks = {tick};
  while (tick < high) ticks.push_back(tick *= 10);
  if (ticks.size() == 1) ticks.push_back(tick * 10);
  return ticks;
}

std::string Path(const ChartLine& line, const Axis& x, const Axis& y, bool log, const char* color) {
  std::string svg, points;
  size_t count = 0;
  const auto finish = [&] {
    if (count == 1) points = absl::StrCat(points, " ", points);  // a dot, by its round end
    if (count > 0) {
      absl::StrAppend(&svg, "<polyline points='", points, "' stroke='", color, "'/>");
    }
    points.clear();
    count = 0;
  };
  for (const auto& [at, value] : line.points) {
    if (std::isnan(value) || (log && value <= 0)) {
      finish();
      continue;
    }
    absl::StrAppendFormat(&points, "%s%.1f,%.1f", count++ == 0 ? "" : " ", x.Place(at),
                          y.Place(value));
  }
  finish();
  return svg;
}

std::string Legend(const std::vector<ChartLine>& lines) {
  std::string html = "<p class='legend'>";
  for (size_t i = 0; i < lines.size(); ++i) {
    absl::StrAppend(&html, "<span><i style='background:", kColors[i % kColorCount], "'></i>",
                    EscapeHtml(lines[i].name), "</span>");
  }
  return absl::StrCat(html, "</p>");
}

// Least and most of what is drawn; false if nothing is.
bool Range(const Chart& chart, double* end, double* low, double* high) {
  bool any = false;
  for (const ChartLine& line : chart.lines) {
    for (const auto& [at, value] : line.points) {
      *end = std::max(*end, at);
      if (std::isnan(value) || (chart.log_y && value <= 0)) continue;
      *low = any ? std::min(*low, value) : value;
      *high = any ? std::max(*high, value) : value;
      any = true;
    }
  }
  if (any && chart.goal) {
    *low = std::min(*low, chart.goal->first);
    *high = std::max(*high, chart.goal->first);
  }
  return any;
}

}  // namespace

const char kChartStyle[] =
    "svg{width:100%;height:auto;background:#fff}svg text{font-size:11px;fill:#444}"
    "polyline{fill:none;stroke-width:1.6;stroke-linecap:round;stroke-linejoin:round}"
    ".grid{stroke:#ddd}.goal{stroke:#c00;stroke-dasharray:5 3}"
    "svg text.goal{fill:#c00;stroke:none}.mark{stroke:#888;stroke-dasharray:3 3}"
    "svg text.mark{stroke:none;fill:#666}.shade{fill:#f6e3df}.bar{fill:#4a6fa5}"
    ".legend{margin:.2em 0 0 0}.legend span{margin-right:1.2em;font-size:13px}"
    ".legend i{display:inline-block;width:.8em;height:.8em;margin-right:.4em}";

std::string EscapeHtml(const std::string& text) {
  return absl::StrReplaceAll(
      text, {{"&", "&amp;"}, {"<", "&lt;"}, {">", "&gt;"}, {"'", "&#39;"}, {"\"", "&quot;"}});
}

std::string RenderChart(const Chart& chart) {
  double end = 0, low = 0, high = 0;
  if (!Range(chart, &end, &low, &high)) return "<p>Nothing was measured yet.</p>";
  const double bottom = kHeight - kBottom, right = kWidth - kRight;
  const Axis y(chart.log_y ? LogTicks(low, high) : Ticks(high), chart.log_y, bottom, kTop);
  const std::vector<double> x_ticks = Ticks(end);
  const Axis x({0, end > 0 ? end : 1}, false, kLeft, right);
  std::string svg = Open(kHeight);
  for (const double tick : y.ticks()) {
    absl::StrAppend(&svg, Segment(kLeft, y.Place(tick), right, y.Place(tick), "grid"),
                    Text(kLeft - 6, y.Place(tick) + 4, absl::StrFormat("%g", tick), "end"));
  }
  for (const double tick : x_ticks) {
    if (tick > end) continue;
    absl::StrAppend(&svg, Text(x.Place(tick), bottom + 18, absl::StrFormat("%g", tick)));
  }
  const double middle = (kTop + bottom) / 2;
  const std::string turned = absl::StrFormat("transform='rotate(-90 14 %.1f)'", middle);
  absl::StrAppend(&svg, Text(14, middle, chart.y_label, "middle", turned.c_str()),
                  Text(right, kHeight - 6, chart.x_label, "end"));
  for (const auto& [at, words] : chart.marks) {
    const bool late = x.Place(at) > kWidth * 0.7;
    absl::StrAppend(&svg, Segment(x.Place(at), kTop, x.Place(at), bottom, "mark"),
                    Text(x.Place(at) + (late ? -4 : 4), kTop + 10, words, late ? "end" : "start",
                         "class='mark'"));
  }
  for (size_t i = 0; i < chart.lines.size(); ++i) {
    absl::StrAppend(&svg, Path(chart.lines[i], x, y, chart.log_y, kColors[i % kColorCount]));
  }
  if (chart.goal) {
    const double at = y.Place(chart.goal->first);
    absl::StrAppend(&svg, Segment(kLeft, at, right, at, "goal"),
                    Text(right, at - 4, chart.goal->second, "end", "class='goal'"));
  }
  return absl::StrCat(svg, "</svg>", Legend(chart.lines));
}

std::string RenderTimeline(const Timeline& timeline) {
  double end = timeline.shaded_to;
  for (const TimelineBar& bar : timeline.bars) end = std::max(end, bar.to);
  if (timeline.goal) end = std::max(end, timeline.goal->first);
  const double right = kWidth - 60;
  const double bottom = kTop + 6 + kRow * static_cast<double>(timeline.bars.size());
  const Axis x({0, end > 0 ? end * 1.02 : 1}, false, kNames, right);
  std::string svg = Open(bottom + kBottom);
  if (timeline.shaded_to > timeline.shaded_from) {
    const double from = x.Place(timeline.shaded_from), to = x.Place(timeline.shaded_to);
    absl::StrAppendFormat(&svg,
                          "<rect class='shade' x='%.1f' y='%.1f' width='%.1f' height='%.1f'/>",
                          from, kTop, to - from, bottom - kTop);
    absl::StrAppend(&svg, Text((from + to) / 2, kTop - 5, timeline.shaded_words));
  }
  for (const double tick : Ticks(end)) {
    if (tick > end) continue;
    absl::StrAppend(&svg, Segment(x.Place(tick), kTop, x.Place(tick), bottom, "grid"),
                    Text(x.Place(tick), bottom + 16, absl::StrFormat("%g", tick)));
  }
  absl::StrAppend(&svg, Text(right, bottom + 32, timeline.x_label, "end"));
  for (size_t i = 0; i < timeline.bars.size(); ++i) {
    const TimelineBar& bar = timeline.bars[i];
    const double top = kTop + 4 + kRow * static_cast<double>(i);
    absl::StrAppendFormat(&svg, "<rect class='bar' x='%.1f' y='%.1f' width='%.1f' height='%.1f'/>",
                          x.Place(bar.from), top,
                          std::max(1.0, x.Place(bar.to) - x.Place(bar.from)), kRow - 6);
    absl::StrAppend(
        &svg, Text(kNames - 8, top + 13, bar.name, "end"),
        Text(x.Place(bar.to) + 5, top + 13, absl::StrFormat("%.1f", bar.to - bar.from), "start"));
  }
  if (timeline.goal) {
    const double at = x.Place(timeline.goal->first);
    absl::StrAppend(&svg, Segment(at, kTop, at, bottom, "goal"),
                    Text(at - 4, kTop + 12, timeline.goal->second, "end", "class='goal'"));
  }
  return absl::StrCat(svg, "</svg>");
}

}  // namespace presync
