// SPDX-License-Identifier: Apache-2.0
/// What the trained models are judged by: bits per byte of each language, and which expert worked for which language.
#pragma once

#include <algorithm>
#include <array>
#include <numeric>
#include <string>
#include <tuple>
#include <vector>

#include "corpus.hpp"
#include "svg.hpp"
#include "training.hpp"

namespace demo {

/// Over the whole validation text.
struct evaluation {
  std::array<double, 3> bits{};  ///< per byte, by language
  double all = 0;                ///< their mean over bytes
  /// [block][expert][language] assignments, where blocks have experts
  std::vector<std::vector<std::array<double, 3>>> use;
};

/// Adds the rows each expert has in a plan whose tokens are all of language l.
inline void count(const moe::routing_plan& p, std::size_t l, std::vector<std::array<double, 3>>& use) {
  use.resize(static_cast<std::size_t>(p.experts()));
  for (std::size_t e = 0; e < use.size(); ++e) use[e][l] += static_cast<double>(p.offsets[e + 1] - p.offsets[e]);
}

/// Every byte of the text, one language after the other.
template <class Block>
evaluation evaluate(const language_model_instance<Block>& m, const text& t, const recipe& r) {
  evaluation out;
  double bytes = 0;
  for (std::size_t l = 0; l < t.languages(); ++l) {
    const std::size_t first = t.begin[l] + text::margin, last = t.begin[l + 1];
    out.bits[l] = bits_per_byte(m, t.bytes, all_of(first, last, r), r, [&](const auto& ctx) {
      if constexpr (requires { ctx.blocks[0].layer.plan; }) {
        out.use.resize(ctx.blocks.size());
        for (std::size_t b = 0; b < ctx.blocks.size(); ++b) count(ctx.blocks[b].layer.plan, l, out.use[b]);
      }
    });
    out.all += out.bits[l] * static_cast<double>(last - first);
    bytes += static_cast<double>(last - first);
  }
  out.all /= bytes;
  return out;
}

/// Training and validation of both models.
inline std::string draw_loss(const learning_curve& mixture, const learning_curve& dense) {
  static constexpr const char *blue = "#1d4ed8", *orange = "#c2410c";
  double low = mixture.valid.front().second, high = low;
  for (const learning_curve* c : {&mixture, &dense})
    for (const auto& [read, bits] : c->valid) {
      low = std::min(low, bits);
      high = std::max(high, bits);
    }
  const axis x{"bytes of text read (millions)", 0, mixture.train.back().first};
  const axis y{"bits per byte", std::floor(low * 5 - 0.25) / 5, std::ceil(high * 5) / 5};
  return line_chart("Learning to predict the next byte", x, y,
                    {{"dense, training", orange, 1.2, 0.45, dense.train}, {"mixture, training", blue, 1.2, 0.45, mixture.train},
                     {"dense, validation", orange, 2.4, 1, dense.valid}, {"mixture, validation", blue, 2.4, 1, mixture.valid}});
}

/// Of the assignments of each expert, the share of each language; experts ordered by the language they work for most.
inline std::string draw_experts(const evaluation& e) {
  std::vector<heat_panel> panels;
  for (std::size_t b = 0; b < e.use.size(); ++b) {
    const auto& use = e.use[b];
    const auto total = [&](std::size_t i) { return use[i][0] + use[i][1] + use[i][2]; };
    const auto share = [&](std::size_t i, std::size_t l) { return total(i) > 0 ? use[i][l] / total(i) : 0.0; };
    const auto favourite = [&](std::size_t i) { return std::max_element(use[i].begin(), use[i].end()) - use[i].begin(); };
    std::vector<std::size_t> order(use.size());
    std::iota(order.begin(), order.end(), std::size_t{0});
    std::sort(order.begin(), order.end(), [&](std::size_t i, std::size_t j) {
      const auto key = [&](std::size_t e) {
        const auto l = favourite(e);
        return std::tuple(l, -share(e, static_cast<std::size_t>(l)), e);
      };
      return key(i) < key(j);
    });
    double all = 0;
    for (const std::size_t i : order) all += total(i);
    heat_panel p{"Block " + std::to_string(b + 1), {}, {}, std::vector<std::vector<double>>(3)};
    for (const std::size_t i : order) {
      p.columns.push_back(std::to_string(i));
      p.notes.push_back(detail::number(100 * total(i) / all, 1));
      for (std::size_t l = 0; l < 3; ++l) p.values[l].push_back(share(i, l));
    }
    panels.push_back(std::move(p));
  }
  return heat_map("Which language each expert works for",
                  "Assignments of an expert by language, in percent. Without a preference each would be 33.", "expert", "load, %",
                  {corpus::languages.begin(), corpus::languages.end()}, panels);
}

}  // namespace demo
