// SPDX-License-Identifier: Apache-2.0
/// A layer of attention in double, from the formulas of the papers: token by token, head by head, key by key.
/// Qiu et al. 2025, arXiv:2505.06708; Su et al. 2021, arXiv:2104.09864; Xiao et al. 2025, arXiv:2511.11571
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <functional>
#include <vector>

namespace reference {

using numbers = std::vector<double>;

/// What the layer has; a function that is empty stands for a feature that is not there.
struct self_attention {
  std::size_t d, h, h_kv, width, dv;
  std::vector<std::size_t> starts;  ///< first tokens of the sequences, and T
  /// Rows of weights by name: query(a, j), key(a, j) and so on give a row of d numbers and a bias.
  struct row {
    const float* weight;
    double bias = 0;
  };
  using rows = std::function<row(std::size_t, std::size_t)>;
  rows query, key, value;
  /// Head a behind its gate, whose logits come from x[d]; the gate of the layer has one head, y. Queries, keys and values
  /// are gated before norm and rotation.
  using gate = std::function<numbers(numbers, std::size_t, const float*)>;
  gate query_gate, key_gate, value_gate, output_gate, layer_gate;
  std::function<numbers(numbers, std::size_t)> turn;                    ///< a head at a position
  std::function<numbers(numbers, bool)> norm;                           ///< a head of queries (true) or keys
  std::function<double(std::size_t, std::size_t)> convolution;          ///< w(l, channel of all key heads)
  std::size_t taps = 0;
  std::function<std::vector<std::size_t>(const std::vector<numbers>&, const numbers&, std::size_t)> visible;
  const float* output;  ///< [d, h*dv]

  static double times(row r, const float* x, std::size_t d) {
    double sum = r.bias;
    for (std::size_t i = 0; i < d; ++i) sum += double{r.weight[i]} * double{x[i]};
    return sum;
  }
  numbers head(const rows& of, const gate& by, std::size_t a, std::size_t n, const float* x) const {
    numbers y(n);
    for (std::size_t j = 0; j < n; ++j) y[j] = times(of(a, j), x, d);
    return by ? by(y, a, x) : y;
  }
  /// Keys of one head of one sequence, as attention reads them.
  std::vector<numbers> keys_of(std::size_t g, const float* x, std::size_t first, std::size_t end) const {
    std::vector<numbers> raw, out;
    for (std::size_t t = first; t < end; ++t) {
      numbers k = head(key, key_gate, g, width, x + t * d);
      if (norm) k = norm(k, false);
      if (turn) k = turn(k, t - first);
      raw.push_back(k);
    }
    for (std::size_t t = 0; t < raw.size(); ++t) {
      numbers k = raw[t];
      for (std::size_t j = 0; taps > 0 && j < width; ++j) {
        double z = 0;
        for (std::size_t l = 0; l < taps && l <= t; ++l) z += convolution(l, g * width + j) * raw[t - l][j];
        k[j] += z / (1 + std::exp(-z));
      }
      out.push_back(k);
    }
    return out;
  }
  /// y[T*d]
  numbers run(const float* x) const {
    const std::size_t T = starts.back();
    numbers y(T * d);
    for (std::size_t s = 0; s + 1 < starts.size(); ++s)
      for (std::size_t a = 0; a < h; ++a) {
        const std::size_t first = starts[s], end = starts[s + 1], g = a / (h / h_kv);
        const std::vector<numbers> k = keys_of(g, x, first, end);
        for (std::size_t t = first; t < end; ++t) {
          numbers q = head(query, query_gate, a, width, x + t * d);
          if (norm) q = norm(q, true);
          if (turn) q = turn(q, t - first);
          const std::vector<std::size_t> seen = visible(k, q, t - first);
          numbers score;
          for (const std::size_t j : seen) {
            double sum = 0;
            for (std::size_t i = 0; i < width; ++i) sum += q[i] * k[j][i];
            score.push_back(sum / std::sqrt(static_cast<double>(width)));
          }
          const double largest = *std::max_element(score.begin(), score.end());
          double total = 0;
          for (double& v : score) total += v = std::exp(v - largest);
          numbers o(dv);
          for (std::size_t j = 0; j < seen.size(); ++j) {
            const numbers v = head(value, value_gate, g, dv, x + (first + seen[j]) * d);
            for (std::size_t i = 0; i < dv; ++i) o[i] += score[j] / total * v[i];
          }
          if (output_gate) o = output_gate(o, a, x + t * d);
          for (std::size_t r = 0; r < d; ++r)
            for (std::size_t i = 0; i < dv; ++i) y[t * d + r] += double{output[r * h * dv + a * dv + i]} * o[i];
        }
      }
    for (std::size_t t = 0; t < T && layer_gate; ++t) {
      const auto at = y.begin() + static_cast<std::ptrdiff_t>(t * d);
      const numbers gated = layer_gate(numbers(at, at + static_cast<std::ptrdiff_t>(d)), 0, x + t * d);
      std::copy(gated.begin(), gated.end(), at);
    }
    return y;
  }
};

/// What a logit gates: a channel of a head, a head, or with the mean of its kind over all heads a channel of every head.
enum class gates { channel, head, channel_of_all };

inline double sigmoid(double z) { return 1 / (1 + std::exp(-z)); }
inline double ns_sigmoid(double z) { return 0.5 + 0.5 * sigmoid(z); }
inline double silu(double z) { return z * sigmoid(z); }

/// y g(s), or y + g(s), with logits s = logit(a, j) x of n heads.
inline self_attention::gate gated_by(self_attention::rows logit, gates what, std::size_t n, std::size_t d,
                                     double (*g)(double), bool adds = false) {
  return [=](numbers y, std::size_t a, const float* x) {
    for (std::size_t j = 0; j < y.size(); ++j) {
      double s = 0;
      if (what == gates::channel) s = self_attention::times(logit(a, j), x, d);
      if (what == gates::head) s = self_attention::times(logit(a, 0), x, d);
      for (std::size_t b = 0; what == gates::channel_of_all && b < n; ++b)
        s += self_attention::times(logit(b, j), x, d) / static_cast<double>(n);
      y[j] = adds ? y[j] + g(s) : y[j] * g(s);
    }
    return y;
  };
}

/// Every key up to the query's own.
inline std::vector<std::size_t> all_until(const std::vector<numbers>&, const numbers&, std::size_t t) {
  std::vector<std::size_t> seen;
  for (std::size_t j = 0; j <= t; ++j) seen.push_back(j);
  return seen;
}
/// The own block of `block` keys up to the query, and the k - 1 earlier ones with the largest mean product.
inline std::function<std::vector<std::size_t>(const std::vector<numbers>&, const numbers&, std::size_t)> best_blocks(
    std::size_t block, std::size_t k) {
  return [=](const std::vector<numbers>& keys, const numbers& q, std::size_t t) {
    std::vector<std::pair<double, std::size_t>> rank;
    for (std::size_t b = 0; b < t / block; ++b) {
      double sum = 0;
      for (std::size_t j = b * block; j < (b + 1) * block; ++j)
        for (std::size_t i = 0; i < q.size(); ++i) sum -= q[i] * keys[j][i] / static_cast<double>(block);
      rank.emplace_back(sum, b);
    }
    std::sort(rank.begin(), rank.end());
    rank.resize(std::min(rank.size(), k - 1));
    std::vector<std::size_t> seen;
    for (const auto& [score, b] : rank)
      for (std::size_t j = b * block; j < (b + 1) * block; ++j) seen.push_back(j);
    for (std::size_t j = t / block * block; j <= t; ++j) seen.push_back(j);
    return seen;
  };
}
/// Pairs (i, i + R/2) of all channels turned by position * base^(-2i/R).
inline numbers turned_half_split(numbers x, std::size_t position, double base = 10000) {
  const std::size_t half = x.size() / 2;
  for (std::size_t i = 0; i < half; ++i) {
    const double angle = static_cast<double>(position) * std::pow(base, -2 * static_cast<double>(i) / static_cast<double>(x.size()));
    const double a = x[i], b = x[i + half];
    x[i] = a * std::cos(angle) - b * std::sin(angle);
    x[i + half] = a * std::sin(angle) + b * std::cos(angle);
  }
  return x;
}
/// The same of pairs (2i, 2i + 1).
inline numbers turned_interleaved(const numbers& x, std::size_t position, double base = 10000) {
  const std::size_t half = x.size() / 2;
  numbers apart(x.size()), y(x.size());
  for (std::size_t i = 0; i < x.size(); ++i) apart[i % 2 * half + i / 2] = x[i];
  apart = turned_half_split(apart, position, base);
  for (std::size_t i = 0; i < x.size(); ++i) y[i] = apart[i % 2 * half + i / 2];
  return y;
}
inline numbers normalised(numbers x, const float* weight) {
  double square = 0;
  for (const double v : x) square += v * v;
  for (std::size_t j = 0; j < x.size(); ++j)
    x[j] *= double{weight[j]} / std::sqrt(square / static_cast<double>(x.size()) + 1e-6);
  return x;
}

}  // namespace reference
