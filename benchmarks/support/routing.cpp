// SPDX-License-Identifier: Apache-2.0
#include "support/routing.hpp"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "moe/core/rng.hpp"

namespace bench {
namespace {

// The k best of `scores`, best first, ties to the lower index.
void best(std::span<const float> scores, std::span<idx> order, dim k) {
  std::iota(order.begin(), order.end(), 0);
  const auto better = [&](idx a, idx b) {
    const float va = scores[static_cast<std::size_t>(a)], vb = scores[static_cast<std::size_t>(b)];
    return va != vb ? va > vb : a < b;
  };
  std::partial_sort(order.begin(), order.begin() + k, order.end(), better);
}

// Chances proportional to rank^-skew that sum up to k, none above 1.
std::vector<double> wanted_chances(dim experts, dim k, double skew) {
  std::vector<double> p(static_cast<std::size_t>(experts));
  for (std::size_t r = 0; r < p.size(); ++r) p[r] = std::pow(static_cast<double>(r + 1), -skew);
  double left = static_cast<double>(k);
  for (std::size_t first = 0; first < p.size(); ++first) {
    const double scale = left / std::accumulate(p.begin() + static_cast<std::ptrdiff_t>(first), p.end(), 0.);
    if (p[first] * scale <= 1) {
      for (std::size_t r = first; r < p.size(); ++r) p[r] *= scale;
      break;
    }
    p[first] = 1;
    --left;
  }
  return p;
}

}  // namespace

std::vector<float> popularity_bias(dim experts, dim k, double skew) {
  std::vector<float> bias(static_cast<std::size_t>(experts));
  if (skew == 0 || experts == k) return bias;
  constexpr std::size_t samples = 2048;
  constexpr int steps = 60;
  const std::vector<double> wanted = wanted_chances(experts, k, skew);
  std::vector<float> noise(samples * bias.size()), scores(bias.size());
  for (std::size_t i = 0; i < noise.size(); ++i) noise[i] = moe::rng(31).normal(i);
  std::vector<idx> order(bias.size());
  std::vector<double> count(bias.size());
  for (int step = 0; step < steps; ++step) {
    std::fill(count.begin(), count.end(), 0.5);
    for (std::size_t t = 0; t < samples; ++t) {
      for (std::size_t e = 0; e < bias.size(); ++e) scores[e] = noise[t * bias.size() + e] + bias[e];
      best(scores, order, k);
      for (dim j = 0; j < k; ++j) ++count[static_cast<std::size_t>(order[static_cast<std::size_t>(j)])];
    }
    for (std::size_t e = 0; e < bias.size(); ++e)
      bias[e] += static_cast<float>(0.5 * std::log(std::max(wanted[e] * samples, 0.5) / count[e]));
  }
  return bias;
}

void plan(batch& b, dim k) {
  const dim experts = b.router.rows;
  std::vector<float> scores(static_cast<std::size_t>(experts));
  std::vector<idx> order(scores.size());
  b.expert.clear();
  b.weight.clear();
  for (dim t = 0; t < b.x.rows; ++t) {
    for (dim e = 0; e < experts; ++e) {
      const float *x = b.x.row(t), *w = b.router.row(e);
      float sum[16] = {};
      dim j = 0;
      for (; j + 16 <= b.x.cols; j += 16)
        for (dim l = 0; l < 16; ++l) sum[l] += x[j + l] * w[j + l];
      for (; j < b.x.cols; ++j) sum[0] += x[j] * w[j];
      scores[static_cast<std::size_t>(e)] = std::accumulate(sum, sum + 16, b.bias[static_cast<std::size_t>(e)]);
    }
    best(scores, order, k);
    const auto score = [&](dim j) { return scores[static_cast<std::size_t>(order[static_cast<std::size_t>(j)])]; };
    float total = 0;
    for (dim j = 0; j < k; ++j) total += std::exp(score(j) - score(0));
    for (dim j = 0; j < k; ++j) {
      b.expert.push_back(order[static_cast<std::size_t>(j)]);
      b.weight.push_back(std::exp(score(j) - score(0)) / total);
    }
  }
}

dim active_experts(const batch& b) {
  std::vector<idx> seen(b.expert);
  std::sort(seen.begin(), seen.end());
  return std::unique(seen.begin(), seen.end()) - seen.begin();
}

}  // namespace bench
