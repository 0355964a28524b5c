// Charts as inline SVG: nothing is fetched and nothing runs in the page that has them. The page
// brings the style (kChartStyle).
#pragma once

#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace presync {

extern const char kChartStyle[];  // CSS

struct ChartLine {
  std::string name;
  std::vector<std::pair<double, double>> points;  // x ascending; y NaN: the line is broken there
};

struct Chart {
  std::string y_label, x_label;
  std::vector<ChartLine> lines;
  std::vector<std::pair<double, std::string>> marks;   // x, words: upright lines
  std::optional<std::pair<double, std::string>> goal;  // y, words: a line across
  bool log_y = false;                                  // then only y > 0 is drawn
};

// A whole <svg> and its legend; words instead if there is no point to draw.
std::string RenderChart(const Chart& chart);

// What followed what: one bar a row. `shaded`: from, to, words; drawn behind the bars.
struct TimelineBar {
  std::string name;
  double from = 0, to = 0;
};
struct Timeline {
  std::string x_label;
  std::vector<TimelineBar> bars;
  double shaded_from = 0, shaded_to = 0;
  std::string shaded_words;
  std::optional<std::pair<double, std::string>> goal;  // x, words
};
std::string RenderTimeline(const Timeline& timeline);

std::string EscapeHtml(const std::string& text);

}  // namespace presync
