// SPDX-License-Identifier: Apache-2.0
#include <doctest/doctest.h>

#include <limits>

#include "moe/backend/scalar.hpp"
#include "moe/recipe/moba.hpp"
#include "support/testing.hpp"

namespace {

using backend = moe::scalar<>;
using moe::dim;
using matrix = std::vector<float>;

constexpr dim d = 8;

// Attention over an explicit mask in double: forward, and dq, dk, dv of <dy, y>. Written from the definition.
struct brute_force {
  dim T, N;
  std::vector<double> y, dq, dk, dv;

  template <class Visible>
  brute_force(dim queries, dim keys, const matrix& q, const matrix& k, const matrix& v, const matrix& dy, Visible visible)
      : T(queries), N(keys), y(size(T)), dq(size(T)), dk(size(N)), dv(size(N)) {
    for (dim t = 0; t < T; ++t) {
      std::vector<double> p(static_cast<std::size_t>(N)), dp(p.size());
      double sum = 0, mean = 0;
      for (dim i = 0; i < N; ++i)
        if (visible(t, i)) sum += p[at(i)] = std::exp(dot(q, t, k, i) / std::sqrt(double{d}));
      for (dim i = 0; i < N; ++i) {
        p[at(i)] = sum > 0 ? p[at(i)] / sum : 0;
        for (dim j = 0; j < d; ++j) y[at(t * d + j)] += p[at(i)] * v[at(i * d + j)];
        mean += p[at(i)] * (dp[at(i)] = dot(dy, t, v, i));
      }
      for (dim i = 0; i < N; ++i) {
        const double ds = p[at(i)] * (dp[at(i)] - mean) / std::sqrt(double{d});
        for (dim j = 0; j < d; ++j) {
          dq[at(t * d + j)] += ds * k[at(i * d + j)];
          dk[at(i * d + j)] += ds * q[at(t * d + j)];
          dv[at(i * d + j)] += p[at(i)] * dy[at(t * d + j)];
        }
      }
    }
  }
  static std::size_t at(dim i) { return static_cast<std::size_t>(i); }
  static std::size_t size(dim rows) { return at(rows * d); }
  static double dot(const matrix& a, dim i, const matrix& b, dim j) {
    double s = 0;
    for (dim c = 0; c < d; ++c) s += double{a[at(i * d + c)]} * b[at(j * d + c)];
    return s;
  }
};

// The blocks a query keeps, from the definition: its own, and the best means among the complete ones before it.
std::vector<char> kept_blocks(dim t, dim N, dim block, int k, const matrix& q, const matrix& keys, dim position) {
  const dim n = (N + block - 1) / block, own = position / block;
  std::vector<double> score(static_cast<std::size_t>(n), -std::numeric_limits<double>::infinity());
  for (dim b = 0; b < own; ++b) {
    double s = 0;
    for (dim i = b * block; i < (b + 1) * block; ++i) s += brute_force::dot(q, t, keys, i);
    score[static_cast<std::size_t>(b)] = s / static_cast<double>(block);
  }
  std::vector<char> kept(static_cast<std::size_t>(n), 0);
  kept[static_cast<std::size_t>(own)] = 1;
  for (int left = k - 1; left > 0; --left) {
    dim best = -1;
    for (dim b = 0; b < own; ++b)
      if (!kept[static_cast<std::size_t>(b)] && (best < 0 || score[static_cast<std::size_t>(b)] > score[static_cast<std::size_t>(best)])) best = b;
    if (best >= 0) kept[static_cast<std::size_t>(best)] = 1;
  }
  return kept;
}

double worst(const matrix& got, const std::vector<double>& wanted) {
  double w = 0;
  for (std::size_t i = 0; i < got.size(); ++i) w = std::max(w, std::fabs(got[i] - wanted[i]) / (1 + std::fabs(wanted[i])));
  return w;
}

// Runs moba<K> on T queries and N keys and compares with the mask it defines.
template <int K>
void compare(dim T, dim N, dim block, bool dense) {
  const dim n = (N + block - 1) / block;
  const matrix q = testing::normals(T * d, 1), k = testing::normals(N * d, 2), v = testing::normals(N * d, 3),
               dy = testing::normals(T * d, 4);
  matrix y(q.size()), dq(q.size()), dk(k.size()), dv(k.size());
  using head = moe::moba<K, backend>;
  const head net({.tokens = T, .d = d, .experts = n}, moe::block_mean_gate{block}, moe::kv_block_expert{block});
  moe::buffer work(net.context_bytes(T) + net.scratch_bytes(T));
  moe::arena mem(work.bytes());
  auto ctx = net.make_context(T, mem);
  typename head::weights w;
  typename head::gradients dw;
  const auto view = [](auto& m) { return moe::matrix_view(m.data(), static_cast<dim>(m.size()) / d, d); };
  const moe::attention_input in{view(q), view(k), view(v)};
  net.forward(w, in, view(y), ctx, mem);
  net.backward(w, in, ctx, view(dy), {view(dq), view(dk), view(dv)}, dw, mem);
  moe::check(ctx.plan);

  std::vector<std::vector<char>> kept;
  for (dim t = 0; t < T; ++t) kept.push_back(kept_blocks(t, N, block, K, q, k, N - T + t));
  const brute_force wanted(T, N, q, k, v, dy, [&](dim t, dim i) {
    return i <= N - T + t && (dense || kept[static_cast<std::size_t>(t)][static_cast<std::size_t>(i / block)]);
  });
  // float32 sums of up to N terms of order one: 1e-5 leaves a factor of ten.
  CHECK(worst(y, wanted.y) < 1e-5);
  CHECK(worst(dq, wanted.dq) < 1e-5);
  CHECK(worst(dk, wanted.dk) < 1e-5);
  CHECK(worst(dv, wanted.dv) < 1e-5);
}

}  // namespace

TEST_SUITE("recipe/moba") {
  TEST_CASE("every block kept is dense causal attention, forward and backward") {
    compare<6>(24, 24, 4, true);
    compare<6>(22, 22, 4, true);  // last block partial
  }
  TEST_CASE("k blocks kept, the own one counted, equal the mask of the definition") {
    compare<1>(24, 24, 4, false);
    compare<2>(22, 22, 4, false);
    compare<3>(37, 37, 5, false);
  }
  TEST_CASE("fewer queries than keys stand at the end of the sequence") { compare<2>(7, 30, 4, false); }
}
