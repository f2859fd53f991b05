// SPDX-License-Identifier: Apache-2.0
/// Which blocks of keys a query has, in one sequence.
#pragma once

#include <algorithm>
#include <limits>

#include "support/attention_trial.hpp"

namespace testing {

/// The earlier blocks that query t chose under head a, ascending.
inline std::vector<idx> chosen_by(const std::vector<idx>& chosen, const reference::attention_shape& s, dim k, dim t, dim a) {
  std::vector<idx> r(chosen.begin() + (t * s.h + a) * (k - 1), chosen.begin() + (t * s.h + a + 1) * (k - 1));
  std::erase(r, -1);
  std::sort(r.begin(), r.end());
  return r;
}
/// The same of every query and head by definition: the k - 1 earlier blocks whose mean key has the largest product with the
/// query, the lower of equal ones; NaN and -inf never.
template <class T>
std::vector<std::vector<idx>> chosen_by_definition(const attention_trial<T>& t, dim block, dim k) {
  const reference::attention_shape& s = t.shape;
  const auto number = [](const std::vector<T>& v, dim i) {
    return static_cast<double>(static_cast<float>(v[static_cast<std::size_t>(i)]));
  };
  std::vector<double> sums(static_cast<std::size_t>(s.n / block * s.h_kv * s.d));  // of whole blocks
  for (dim i = 0; i < s.n / block * block * s.h_kv * s.d; ++i) {
    const dim row = s.h_kv * s.d;
    sums[static_cast<std::size_t>(i / row / block * row + i % row)] += number(t.k, i);
  }
  std::vector<std::vector<idx>> all;
  for (dim i = 0; i < s.m; ++i)
    for (dim a = 0; a < s.h; ++a) {
      std::vector<std::pair<double, idx>> order;
      for (dim c = 0; c < (s.n - s.m + i) / block; ++c) {
        double score = 0;
        for (dim j = 0; j < s.d; ++j)
          score += number(t.q, (i * s.h + a) * s.d + j) *
                   sums[static_cast<std::size_t>((c * s.h_kv + a / (s.h / s.h_kv)) * s.d + j)];
        if (score > -std::numeric_limits<double>::infinity()) order.emplace_back(-score, static_cast<idx>(c));
      }
      std::sort(order.begin(), order.end());
      std::vector<idx> r;
      for (const auto& [score, c] : order)
        if (static_cast<dim>(r.size()) < k - 1) r.push_back(c);
      std::sort(r.begin(), r.end());
      all.push_back(std::move(r));
    }
  return all;
}
/// Queries under a head that chose other blocks than the definition.
template <class T>
dim wrong_choices(const attention_trial<T>& t, dim block, dim k, const std::vector<idx>& chosen) {
  const auto wanted = chosen_by_definition(t, block, k);
  dim wrong = 0;
  for (dim i = 0; i < t.shape.m; ++i)
    for (dim a = 0; a < t.shape.h; ++a)
      wrong += chosen_by(chosen, t.shape, k, i, a) != wanted[static_cast<std::size_t>(i * t.shape.h + a)];
  return wrong;
}
/// Numbers of which one key of block 0 scores `strange` with every query, and the last query but one is not a number.
template <class T>
attention_trial<T> with_strange_block(const reference::attention_shape& s, float strange) {
  attention_trial<T> t(s);
  for (dim i = 0; i < s.m * s.h; ++i) t.q[static_cast<std::size_t>(i * s.d + 1)] = T(1.f);
  for (dim g = 0; g < s.h_kv; ++g) t.k[static_cast<std::size_t>((2 * s.h_kv + g) * s.d + 1)] = T(strange);
  t.q[static_cast<std::size_t>((s.m - 2) * s.h * s.d)] = T(std::numeric_limits<float>::quiet_NaN());
  return t;
}

}  // namespace testing
