// SPDX-License-Identifier: Apache-2.0
/// Two pictures as SVG text: lines over an axis, and a heat map. Each stands on its own white ground, so that it can be read
/// on a page of any colour.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdarg>
#include <cstdio>
#include <string>
#include <utility>
#include <vector>

namespace demo {

struct line {
  std::string name, colour;
  double width = 2;
  double opacity = 1;
  std::vector<std::pair<double, double>> points;
};
struct axis {
  std::string label;
  double from = 0, to = 1;
};

/// One panel of a heat map: values in [0, 1] for rows and columns, with a line of text under each column.
struct heat_panel {
  std::string title;
  std::vector<std::string> columns, notes;
  std::vector<std::vector<double>> values;  ///< [rows][columns]
};

namespace detail {

inline constexpr const char *ink = "#1c2733", *faint = "#5b6773", *grid = "#dfe4e8";

/// SVG text under construction.
class drawing {
 public:
  drawing(double width, double height) {
    add("<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 %.0f %.0f\" width=\"%.0f\" height=\"%.0f\" "
        "font-family=\"system-ui, 'DejaVu Sans', sans-serif\" font-size=\"13\">\n", width, height, width, height);
    add("<rect width=\"%.0f\" height=\"%.0f\" rx=\"8\" fill=\"#ffffff\"/>\n", width, height);
  }
#if defined(__GNUC__)
  __attribute__((format(printf, 2, 3)))
#endif
  void add(const char* format, ...) {
    char buffer[1024];
    std::va_list arguments;
    va_start(arguments, format);
    std::vsnprintf(buffer, sizeof buffer, format, arguments);
    va_end(arguments);
    text_ += buffer;
  }
  void label(double x, double y, const std::string& s, const char* anchor, const char* colour = ink, int size = 13,
             bool bold = false) {
    add("<text x=\"%.1f\" y=\"%.1f\" text-anchor=\"%s\" fill=\"%s\" font-size=\"%d\"%s>%s</text>\n", x, y, anchor, colour, size,
        bold ? " font-weight=\"600\"" : "", s.c_str());
  }
  void rule(double x0, double y0, double x1, double y1, const char* colour) {
    add("<line x1=\"%.1f\" y1=\"%.1f\" x2=\"%.1f\" y2=\"%.1f\" stroke=\"%s\"/>\n", x0, y0, x1, y1, colour);
  }
  std::string finish() {
    text_ += "</svg>\n";
    return std::move(text_);
  }

 private:
  std::string text_;
};

/// Round steps, at most `most` of them over a range: 1, 2 or 5 times a power of ten.
inline double tick_step(double range, int most) {
  const double rough = range / most, power = std::pow(10.0, std::floor(std::log10(rough)));
  for (const double m : {1.0, 2.0, 5.0})
    if (m * power >= rough) return m * power;
  return 10 * power;
}
inline std::string number(double v, double step) {
  char s[32];
  std::snprintf(s, sizeof s, "%.*f", std::max(0, static_cast<int>(std::ceil(-std::log10(step) - 1e-9))), std::fabs(v) < step / 2 ? 0.0 : v);
  return s;
}

/// White to dark blue; pale up to a third, so that what is above stands out.
inline std::string shade(double v) {
  static constexpr double stops[4][3] = {{255, 255, 255}, {222, 235, 247}, {66, 146, 198}, {8, 48, 107}};
  const double at = std::clamp(v, 0.0, 1.0) * 3;
  const int i = std::min(2, static_cast<int>(at));
  int rgb[3];
  for (int c = 0; c < 3; ++c) rgb[c] = static_cast<int>(std::lround(stops[i][c] + (at - i) * (stops[i + 1][c] - stops[i][c])));
  char s[32];
  std::snprintf(s, sizeof s, "#%02x%02x%02x", rgb[0] & 255, rgb[1] & 255, rgb[2] & 255);
  return s;
}

}  // namespace detail

/// Lines over two axes with ticks, a grid and a legend in the upper right corner. What lies beyond the axes is cut off.
inline std::string line_chart(const std::string& title, const axis& x, const axis& y, const std::vector<line>& lines) {
  constexpr double width = 820, height = 480, left = 72, right = 24, top = 52, bottom = 60;
  const auto at_x = [&](double v) { return left + (v - x.from) / (x.to - x.from) * (width - left - right); };
  const auto at_y = [&](double v) { return height - bottom - (v - y.from) / (y.to - y.from) * (height - top - bottom); };
  detail::drawing d(width, height);
  d.label(left, 30, title, "start", detail::ink, 17, true);

  const double step_x = detail::tick_step(x.to - x.from, 9), step_y = detail::tick_step(y.to - y.from, 9);
  for (double v = std::ceil(y.from / step_y - 1e-9) * step_y; v <= y.to + 1e-9 * step_y; v += step_y) {
    d.rule(left, at_y(v), width - right, at_y(v), detail::grid);
    d.label(left - 8, at_y(v) + 4.5, detail::number(v, step_y), "end", detail::faint);
  }
  for (double v = std::ceil(x.from / step_x - 1e-9) * step_x; v <= x.to + 1e-9 * step_x; v += step_x) {
    d.rule(at_x(v), height - bottom, at_x(v), height - bottom + 5, detail::faint);
    d.label(at_x(v), height - bottom + 21, detail::number(v, step_x), "middle", detail::faint);
  }
  d.rule(left, height - bottom, width - right, height - bottom, detail::faint);
  d.label((left + width - right) / 2, height - 14, x.label, "middle");
  d.add("<text transform=\"translate(22 %.1f) rotate(-90)\" text-anchor=\"middle\" fill=\"%s\">%s</text>\n",
        (top + height - bottom) / 2, detail::ink, y.label.c_str());

  d.add("<clipPath id=\"plot\"><rect x=\"%.1f\" y=\"%.1f\" width=\"%.1f\" height=\"%.1f\"/></clipPath>\n", left, top,
        width - left - right, height - top - bottom);
  for (const line& l : lines) {
    d.add("<polyline clip-path=\"url(#plot)\" fill=\"none\" stroke-linejoin=\"round\" stroke=\"%s\" stroke-width=\"%.1f\" "
          "stroke-opacity=\"%.2f\" points=\"", l.colour.c_str(), l.width, l.opacity);
    for (const auto& [px, py] : l.points) d.add("%.1f,%.1f ", at_x(px), at_y(py));
    d.add("\"/>\n");
  }

  std::size_t longest = 0;
  for (const line& l : lines) longest = std::max(longest, l.name.size());
  const double legend = 8.0 * static_cast<double>(longest) + 56, rows = 22.0 * static_cast<double>(lines.size());
  const double legend_x = width - right - legend - 8;
  d.add("<rect x=\"%.1f\" y=\"%.1f\" width=\"%.1f\" height=\"%.1f\" rx=\"4\" fill=\"#ffffff\" fill-opacity=\"0.9\" stroke=\"%s\"/>\n",
        legend_x, top + 8, legend, rows + 12, detail::grid);
  for (std::size_t i = 0; i < lines.size(); ++i) {
    const double row = top + 26 + 22 * static_cast<double>(i);
    d.add("<line x1=\"%.1f\" y1=\"%.1f\" x2=\"%.1f\" y2=\"%.1f\" stroke=\"%s\" stroke-width=\"%.1f\" stroke-opacity=\"%.2f\"/>\n",
          legend_x + 10, row, legend_x + 40, row, lines[i].colour.c_str(), lines[i].width, lines[i].opacity);
    d.label(legend_x + 48, row + 4.5, lines[i].name, "start");
  }
  return d.finish();
}

/// Panels below each other, each a grid of cells that carry their value in percent, with a colour bar on the right.
inline std::string heat_map(const std::string& title, const std::string& subtitle, const std::string& column_label,
                            const std::string& note_label, const std::vector<std::string>& rows,
                            const std::vector<heat_panel>& panels) {
  constexpr double cell_w = 40, cell_h = 30, left = 120, top = 84, gap = 84, bar = 110;
  std::size_t columns = 0;
  for (const heat_panel& p : panels) columns = std::max(columns, p.columns.size());
  const double panel_h = cell_h * static_cast<double>(rows.size());
  const double grid_w = cell_w * static_cast<double>(columns);
  const double width = std::max(left + grid_w + bar, 24 + 7.2 * static_cast<double>(subtitle.size()));
  const double height = top + static_cast<double>(panels.size()) * (panel_h + gap) - 24;
  detail::drawing d(width, height);
  d.label(24, 30, title, "start", detail::ink, 17, true);
  d.label(24, 51, subtitle, "start", detail::faint);

  for (std::size_t i = 0; i < panels.size(); ++i) {
    const heat_panel& p = panels[i];
    const double y0 = top + static_cast<double>(i) * (panel_h + gap);
    d.label(left, y0 - 8, p.title, "start", detail::ink, 13, true);
    for (std::size_t r = 0; r < rows.size(); ++r) {
      const double y = y0 + cell_h * static_cast<double>(r);
      d.label(left - 10, y + cell_h / 2 + 4.5, rows[r], "end");
      for (std::size_t c = 0; c < p.columns.size(); ++c) {
        const double v = p.values[r][c], x = left + cell_w * static_cast<double>(c);
        d.add("<rect x=\"%.1f\" y=\"%.1f\" width=\"%.1f\" height=\"%.1f\" fill=\"%s\" stroke=\"%s\"/>\n", x, y, cell_w, cell_h,
              detail::shade(v).c_str(), detail::grid);
        d.label(x + cell_w / 2, y + cell_h / 2 + 4, detail::number(100 * v, 1), "middle", v > 0.55 ? "#ffffff" : detail::ink, 12);
      }
    }
    for (const auto& [line, y] : {std::pair(&p.columns, y0 + panel_h + 18), std::pair(&p.notes, y0 + panel_h + 35)}) {
      for (std::size_t c = 0; c < line->size(); ++c)
        d.label(left + cell_w * (static_cast<double>(c) + 0.5), y, (*line)[c], "middle", detail::faint, 12);
      d.label(left - 10, y, line == &p.columns ? column_label : note_label, "end", detail::faint, 12);
    }
  }

  constexpr int steps = 40;
  const double bar_x = left + grid_w + 32, bar_h = std::max(panel_h, 120.0);
  for (int i = 0; i < steps; ++i)
    d.add("<rect x=\"%.1f\" y=\"%.2f\" width=\"16\" height=\"%.2f\" fill=\"%s\"/>\n", bar_x, top + bar_h * (1 - (i + 1.0) / steps),
          bar_h / steps + 0.3, detail::shade((i + 0.5) / steps).c_str());
  for (const int percent : {0, 50, 100})
    d.label(bar_x + 22, top + bar_h * (1 - percent / 100.0) + 4.5, std::to_string(percent) + " %", "start", detail::faint, 12);
  return d.finish();
}

}  // namespace demo
