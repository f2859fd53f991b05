// SPDX-License-Identifier: Apache-2.0
/// Attention from its formulas, in double over an explicit matrix of who sees whom. It uses nothing of the library but the
/// names of integers.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "moe/core/types.hpp"

namespace reference {

using moe::dim;
using moe::idx;

/// What attention gives and its gradients, token-major: o[m,h*dv] lse[m,h] dq[m,h*d] dk[n,h_kv*d] dv[n,h_kv*dv].
template <class T>
struct attention_numbers {
  std::vector<T> o, lse, dq, dk, dv;
};

/// Numbers of one problem: m queries under h heads, n keys under h_kv heads.
struct attention_shape {
  dim h, h_kv, d, dv, m, n;
  std::vector<idx> query_offsets{}, key_offsets{};  ///< of packed sequences, or none

  dim sequences() const { return query_offsets.empty() ? 1 : static_cast<dim>(query_offsets.size()) - 1; }
};

/// seen(t, a, j): query t sees key j under head a.
class attention_matrix {
 public:
  explicit attention_matrix(const attention_shape& s) : h_(s.h), n_(s.n), seen_(static_cast<std::size_t>(s.m * s.h * s.n)) {}
  char& operator()(dim t, dim a, dim j) { return seen_[static_cast<std::size_t>((t * h_ + a) * n_ + j)]; }
  char operator()(dim t, dim a, dim j) const { return seen_[static_cast<std::size_t>((t * h_ + a) * n_ + j)]; }

 private:
  dim h_, n_;
  std::vector<char> seen_;
};

/// f(first query, queries, first key, keys) of every sequence.
template <class F>
void for_each_sequence(const attention_shape& s, F f) {
  for (std::size_t i = 0; i < static_cast<std::size_t>(s.sequences()); ++i) {
    const dim q = s.query_offsets.empty() ? 0 : s.query_offsets[i], k = s.key_offsets.empty() ? 0 : s.key_offsets[i];
    f(q, (s.query_offsets.empty() ? s.m : s.query_offsets[i + 1]) - q, k, (s.key_offsets.empty() ? s.n : s.key_offsets[i + 1]) - k);
  }
}

/// Query i of m stands at N - m + i of the N keys of its sequence; a window is the last so many keys.
inline attention_matrix dense_matrix(const attention_shape& s, bool causal, dim window) {
  attention_matrix seen(s);
  for_each_sequence(s, [&](dim q, dim m, dim k, dim n) {
    for (dim i = 0; i < m; ++i)
      for (dim j = 0; j < n; ++j) {
        const dim at = n - m + i;
        for (dim a = 0; a < s.h; ++a) seen(q + i, a, k + j) = !causal || (j <= at && (window == 0 || j > at - window));
      }
  });
  return seen;
}

/// Blocks of `block` keys as in MoBA: the own one, and the k - 1 before it whose mean key has the largest product with the
/// query, the lower one of two equals. `gap` is the least distance between a score that was taken and one that was not.
struct chosen_blocks {
  attention_matrix seen;
  double gap = std::numeric_limits<double>::infinity();
  dim taken = 0;  ///< by all queries under all heads, the own ones too
};
template <class T>
chosen_blocks block_matrix(const attention_shape& s, dim block, dim k, const std::vector<T>& q, const std::vector<T>& keys) {
  chosen_blocks all{attention_matrix(s)};
  for_each_sequence(s, [&](dim first_q, dim m, dim first_k, dim n) {
    for (dim i = std::max<dim>(0, m - n); i < m; ++i)
      for (dim a = 0; a < s.h; ++a) {
        const dim at = n - m + i, own = at / block, key_head = a / (s.h / s.h_kv);
        std::vector<std::pair<double, dim>> order;  // minus score, so that the first is best
        for (dim c = 0; c < own; ++c) {
          double sum = 0;
          for (dim j = c * block; j < (c + 1) * block; ++j)
            for (dim x = 0; x < s.d; ++x)
              sum += static_cast<double>(static_cast<float>(q[static_cast<std::size_t>(((first_q + i) * s.h + a) * s.d + x)])) *
                     static_cast<float>(keys[static_cast<std::size_t>(((first_k + j) * s.h_kv + key_head) * s.d + x)]);
          order.emplace_back(-sum / static_cast<double>(block), c);
        }
        std::sort(order.begin(), order.end());
        const std::size_t earlier = std::min(order.size(), static_cast<std::size_t>(k - 1));
        if (earlier > 0 && earlier < order.size()) all.gap = std::min(all.gap, order[earlier].first - order[earlier - 1].first);
        order.resize(earlier);
        order.emplace_back(0, own);
        all.taken += static_cast<dim>(order.size());
        for (const auto& [score, c] : order)
          for (dim j = c * block; j < std::min((c + 1) * block, at + 1); ++j) all.seen(first_q + i, a, first_k + j) = 1;
      }
  });
  return all;
}

/// o = P v, P the softmax of scale q k^T over what is seen; and for the loss <dout, o>, with D = <dout, o> row by row:
/// dv = P^T dout, dS = P (dout v^T - D), dq = scale dS k, dk = scale dS^T q. A row that sees nothing gives o = 0, lse = -inf.
template <class T>
attention_numbers<double> attention(const attention_shape& s, double scale, const attention_matrix& seen, const std::vector<T>& q,
                                    const std::vector<T>& k, const std::vector<T>& v, const std::vector<float>& dout) {
  const auto zeros = [](dim rows, dim cols) { return std::vector<double>(static_cast<std::size_t>(rows * cols)); };
  attention_numbers<double> r{zeros(s.m, s.h * s.dv), zeros(s.m, s.h), zeros(s.m, s.h * s.d), zeros(s.n, s.h_kv * s.d),
                              zeros(s.n, s.h_kv * s.dv)};
  std::vector<double> p(static_cast<std::size_t>(s.n)), dp(p.size());
  const auto row = [](const auto& x, dim token, dim heads, dim a, dim width) { return x.data() + (token * heads + a) * width; };
  const auto inner = [](const auto* x, const auto* y, dim n) {
    double sum = 0;
    for (dim i = 0; i < n; ++i) sum += static_cast<double>(static_cast<float>(x[i])) * static_cast<float>(y[i]);
    return sum;
  };
  for (dim t = 0; t < s.m; ++t)
    for (dim a = 0; a < s.h; ++a) {
      const dim g = a / (s.h / s.h_kv);
      std::vector<dim> keys;
      for (dim j = 0; j < s.n; ++j)
        if (seen(t, a, j)) keys.push_back(j);
      double largest = -std::numeric_limits<double>::infinity(), sum = 0, delta = 0;
      for (const dim j : keys) {
        const double score = scale * inner(row(q, t, s.h, a, s.d), row(k, j, s.h_kv, g, s.d), s.d);
        largest = std::max(largest, p[static_cast<std::size_t>(j)] = score);
      }
      for (const dim j : keys) sum += p[static_cast<std::size_t>(j)] = std::exp(p[static_cast<std::size_t>(j)] - largest);
      r.lse[static_cast<std::size_t>(t * s.h + a)] = largest + std::log(sum);
      for (const dim j : keys) {
        const auto at = static_cast<std::size_t>(j);
        p[at] /= sum;
        dp[at] = inner(row(dout, t, s.h, a, s.dv), row(v, j, s.h_kv, g, s.dv), s.dv);
        delta += p[at] * dp[at];
        for (dim x = 0; x < s.dv; ++x) {
          r.o[static_cast<std::size_t>((t * s.h + a) * s.dv + x)] += p[at] * static_cast<float>(row(v, j, s.h_kv, g, s.dv)[x]);
          r.dv[static_cast<std::size_t>((j * s.h_kv + g) * s.dv + x)] += p[at] * row(dout, t, s.h, a, s.dv)[x];
        }
      }
      for (const dim j : keys) {
        const double ds = scale * p[static_cast<std::size_t>(j)] * (dp[static_cast<std::size_t>(j)] - delta);
        for (dim x = 0; x < s.d; ++x) {
          r.dq[static_cast<std::size_t>((t * s.h + a) * s.d + x)] += ds * static_cast<float>(row(k, j, s.h_kv, g, s.d)[x]);
          r.dk[static_cast<std::size_t>((j * s.h_kv + g) * s.d + x)] += ds * static_cast<float>(row(q, t, s.h, a, s.d)[x]);
        }
      }
    }
  return r;
}

/// Largest |got - wanted| / (1 + |wanted|); infinite where one is not finite and the other is something else.
inline double worst_difference(const std::vector<float>& got, const std::vector<double>& wanted) {
  if (got.size() != wanted.size()) return HUGE_VAL;
  double worst = 0;
  for (std::size_t i = 0; i < got.size(); ++i) {
    if (got[i] == wanted[i]) continue;
    const double error = std::fabs(got[i] - wanted[i]) / (1 + std::fabs(wanted[i]));
    worst = error <= worst ? worst : error < HUGE_VAL ? error : HUGE_VAL;
  }
  return worst;
}

}  // namespace reference
