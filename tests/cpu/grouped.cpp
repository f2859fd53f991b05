// SPDX-License-Identifier: Apache-2.0
// Products over the rows of a plan, and what a batch owes its tokens.
#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <tuple>
#include <utility>
#include <vector>

#include "moe/backend/cpu.hpp"
#include "moe/moe.hpp"
#include "support/layer_runs.hpp"
#include "support/testing.hpp"

namespace {

using moe::dim;
using moe::gathered;
using moe::idx;
using moe::matrix_stack;
using moe::matrix_view;
using cpu = moe::host_backend<moe::arch::native, moe::serial>;
using plain = moe::host_backend<moe::arch::scalar, moe::serial>;

/// Rows of each expert; tokens are the rows backwards.
struct grouping {
  std::vector<idx> offsets{0}, token;
  std::vector<float> weight;

  explicit grouping(const std::vector<idx>& rows) {
    for (const idx n : rows) offsets.push_back(offsets.back() + n);
    for (idx r = offsets.back(); r-- > 0;) token.push_back(r);
    weight = testing::normals(offsets.back(), 11);
  }
  dim rows() const { return offsets.back(); }
  dim experts() const { return static_cast<dim>(offsets.size()) - 1; }
  moe::bank_rows bank() const { return {.offsets = offsets, .token = token, .weight = weight}; }
};

/// Every expert empty; some; one row each; one expert with all rows, in more than one chunk; many experts; no rows at all.
const std::vector<std::vector<idx>> groupings{{0, 0},    {0, 3, 0, 1}, {1, 1, 1}, {0, 600}, std::vector<idx>(40, 2),
                                              {0, 75, 8}};

struct grouped_results {
  std::vector<float> nt, biased, nn, tn, up, z;
  friend bool operator==(const grouped_results&, const grouped_results&) = default;
};
/// Operands of all grouped products: x[A,d], h[A,f], w and v [E*f,d], bias[E*f,1].
struct operands {
  const grouping& g;
  dim d, f, A = g.rows(), E = g.experts();
  bool whole;
  std::vector<float> x = numbers(A * d, 1), w = numbers(E * f * d, 2), v = numbers(E * f * d, 3), bias = numbers(E * f, 4),
                     h = numbers(A * f, 5);
  grouped_results start{numbers(A * f, 6),   numbers(A* f, 7),  numbers(A* d, 8),
                        numbers(E* f* d, 9), numbers(A* f, 10), numbers(2 * A * f, 11)};

  std::vector<float> numbers(dim n, std::uint64_t seed) const {
    return whole ? testing::integers(n, seed, 2) : testing::normals(n, seed);
  }
};

template <class B>
grouped_results run(const operands& o) {
  const auto [d, f, A, E] = std::tuple(o.d, o.f, o.A, o.E);
  const auto on = testing::on<B>({A, d, f, E});
  const auto stack = [](const std::vector<float>& m, dim cols, dim each) {
    return moe::stack(matrix_view<const float>{m.data(), static_cast<dim>(m.size()) / cols, cols}, each);
  };
  const auto ws = stack(o.w, d, f), vs = stack(o.v, d, f), bs = stack(o.bias, 1, f);
  const auto rows = o.g.bank();
  const auto x = rows.gather(matrix_view<const float>{o.x.data(), A, d});
  const gathered<float> h{{o.h.data(), A, f}};
  grouped_results r = o.start;
  grouped_gemm_nt(on, rows, x, ws, {r.nt.data(), A, f});
  grouped_gemm_nt(on, rows, x, ws, bs, {r.biased.data(), A, f});
  grouped_gemm_nn(on, rows, h, ws, {r.nn.data(), A, d});
  grouped_gemm_tn(on, rows, h, x, moe::stack(matrix_view<float>{r.tn.data(), E * f, d}, f));
  grouped_up(on, rows, x, moe::glu<moe::relu>{}, ws, bs, vs, {}, {r.z.data(), A, 2 * f}, {r.up.data(), A, f});
  return r;
}
/// The same by definition; exact with whole numbers.
grouped_results by_definition(const operands& o) {
  const auto [d, f] = std::pair(o.d, o.f);
  grouped_results r = o.start;
  const auto at = [](auto& m, dim row, dim cols, dim col) -> auto& { return m[static_cast<std::size_t>(row * cols + col)]; };
  for (dim e = 0; e < o.E; ++e)
    for (dim row = o.g.offsets[static_cast<std::size_t>(e)]; row < o.g.offsets[static_cast<std::size_t>(e) + 1]; ++row)
      for (dim j = 0, token = o.g.token[static_cast<std::size_t>(row)]; j < f; ++j) {
        float gate = 0, up = 0;
        for (dim k = 0; k < d; ++k) {
          gate += at(o.x, token, d, k) * at(o.w, e * f + j, d, k);
          up += at(o.x, token, d, k) * at(o.v, e * f + j, d, k);
          at(r.nn, row, d, k) += at(o.h, row, f, j) * at(o.w, e * f + j, d, k);
          at(r.tn, e * f + j, d, k) += at(o.h, row, f, j) * at(o.x, token, d, k);
        }
        at(r.nt, row, f, j) += gate;
        gate += at(o.bias, e * f + j, 1, 0);
        at(r.biased, row, f, j) = gate;
        at(r.z, row, 2 * f, j) = gate;
        at(r.z, row, 2 * f, f + j) = up;
        at(r.up, row, f, j) = std::max(gate, 0.f) * up;
      }
  return r;
}
double distance(const std::vector<float>& a, const std::vector<float>& b) {
  double worst = 0;
  for (std::size_t i = 0; i < a.size(); ++i) worst = std::max(worst, std::abs(double{a[i]} - b[i]) / (1 + std::abs(b[i])));
  return worst;
}

template <class Form>
using layer_of = moe::layer<moe::linear_gate, moe::top_k<3>, moe::basic_ffn_expert<Form>, moe::weighted_sum, cpu>;

/// y of each token in a batch of T and alone.
template <class L>
bool same_alone(const moe::shape& s) {
  const L net(s);
  testing::model<L> m(net, s.tokens, s.d, 4);
  m.forward();
  const auto together = m.y;
  moe::buffer memory(net.inference_context_bytes(1) + net.scratch_bytes(1));
  moe::arena mem(memory.bytes());
  auto ctx = net.make_inference_context(1, mem);
  for (dim t = 0; t < s.tokens; ++t)
    net.forward(m.w, {m.x.data() + t * s.d, 1, s.d}, {m.y.data() + t * s.d, 1, s.d}, ctx, mem);
  return together == m.y;
}

}  // namespace

TEST_SUITE("backend/cpu/grouped") {
  TEST_CASE("grouped products agree with the scalar backend, whatever the heights of the experts") {
    for (const auto& rows : groupings)
      for (const auto& [d, f] : {std::pair<dim, dim>{5, 3}, {33, 70}, {64, 16}}) {
        CAPTURE(rows.size());
        CAPTURE(d);
        const grouping g(rows);
        const operands o{.g = g, .d = d, .f = f, .whole = false};
        const auto got = run<cpu>(o), want = run<plain>(o);
        CHECK(distance(got.nt, want.nt) < 1e-4);
        CHECK(distance(got.biased, want.biased) < 1e-4);
        CHECK(distance(got.nn, want.nn) < 1e-4);
        CHECK(distance(got.tn, want.tn) < 1e-4);
        CHECK(distance(got.up, want.up) < 1e-4);
        CHECK(distance(got.z, want.z) < 1e-4);
      }
  }
  TEST_CASE("with whole numbers grouped products are exactly what they are by definition") {
    for (const auto& rows : groupings)
      for (const auto& [d, f] : {std::pair<dim, dim>{5, 3}, {33, 70}, {270, 9}}) {
        const grouping g(rows);
        const operands o{.g = g, .d = d, .f = f, .whole = true};
        const auto want = by_definition(o);
        CHECK(run<cpu>(o) == want);
        CHECK(run<plain>(o) == want);
      }
  }
  TEST_CASE("a product that starts from a bias overwrites: bias where there is one, else nothing") {
    const grouping g({2});
    const std::vector<float> x{1, 2}, w{3, 4}, bias{10, 20};
    const auto on = testing::on<cpu>({2, 1, 2, 1});
    std::vector<float> y(4, 99.f);
    const gathered<float> rows{{x.data(), 2, 1}};
    const auto ws = moe::stack(matrix_view<const float>{w.data(), 2, 1}, 2);
    grouped_gemm_nt(on, g.bank(), rows, ws, moe::stack(matrix_view<const float>{bias.data(), 2, 1}, 2), {y.data(), 2, 2});
    CHECK(y == std::vector<float>{13, 24, 16, 28});
    grouped_gemm_nt(on, g.bank(), rows, ws, matrix_stack<const float>{}, {y.data(), 2, 2});
    CHECK(y == std::vector<float>{3, 4, 6, 8});
  }
  TEST_CASE("the bias of interleaved rows is every other element") {
    const grouping g({0, 1});
    const std::vector<float> x{1}, w{1, 2, 3, 4, 5, 6, 7, 8}, bias{10, 20, 30, 40, 50, 60, 70, 80};
    const auto on = testing::on<cpu>({1, 1, 2, 2});
    std::vector<float> y(2);
    const matrix_view<const float> gate_up(w.data(), 8, 1), gate_up_bias(bias.data(), 8, 1);
    grouped_gemm_nt(on, g.bank(), gathered<float>{{x.data(), 1, 1}}, moe::interleaved::up(gate_up, 2),
                    moe::interleaved::up(gate_up_bias, 2), {y.data(), 1, 2});
    CHECK(y == std::vector<float>{66, 88});
  }
  TEST_CASE("a token's result is the same bit for bit in any batch of few tokens") {
    CHECK(same_alone<layer_of<moe::glu<moe::silu>>>({.tokens = 35, .d = 37, .f = 83, .experts = 5}));
    CHECK(same_alone<layer_of<moe::glu<moe::gelu>>>({.tokens = 20, .d = 130, .f = 33, .experts = 4}));
    CHECK(same_alone<layer_of<moe::plain<moe::gelu_tanh>>>({.tokens = 12, .d = 1100, .f = 64, .experts = 9}));
  }
  TEST_CASE("the result of a row among many is the same bit for bit whatever their number") {
    const dim d = 150, f = 70;
    const auto x = testing::normals(700 * d, 1), w = testing::normals(f * d, 2);
    const auto product = [&](dim rows) {
      std::vector<float> y(static_cast<std::size_t>(rows * f));
      gemm_nt(testing::on<cpu>({rows, d, f, 1}), matrix_view<const float>{x.data(), rows, d},
              matrix_view<const float>{w.data(), f, d}, matrix_view<float>{y.data(), rows, f});
      return y;
    };
    const auto most = product(700);
    for (const dim rows : {36, 37, 72, 73, 253, 336, 337, 699}) {
      const auto some = product(rows);
      CAPTURE(rows);
      CHECK(std::equal(some.begin(), some.end(), most.begin()));
    }
  }
  TEST_CASE("an empty batch changes nothing") {
    using layer = testing::ffn_layer<2, cpu>;
    testing::model<layer> m(layer({.d = 8, .f = 8, .experts = 4}), 0, 8, 1);
    m.forward();
    m.backward();
    CHECK(std::all_of(m.gradients().begin(), m.gradients().end(), [](float v) { return v == 0; }));
  }
}
