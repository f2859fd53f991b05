// SPDX-License-Identifier: Apache-2.0
#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "moe/moe.hpp"
#include "moe/static_layer.hpp"
#include "support/levels.hpp"
#include "support/reference.hpp"
#include "support/testing.hpp"

namespace {

using backend = moe::scalar<>;
using moe::dim;

/// gelu of the formula.
const reference::activation gelu{[](double z) { return z * std::erfc(-z / std::sqrt(2.)) / 2; }, nullptr};

// A static layer beside a run-time one with the same weights, on the same tokens, forward and backward, and the formulas.
template <int D, int F, int E, int K, class Form>
void compare(std::uint64_t seed, reference::activation act = reference::silu) {
  using run_time = moe::layer<moe::linear_gate, moe::top_k<K>, moe::basic_ffn_expert<Form>, moe::weighted_sum, backend>;
  testing::model<run_time> m(run_time({.tokens = 5, .d = D, .f = F, .experts = E}), 5, D, seed);
  m.forward();
  m.backward();
  const auto whole = [](moe::matrix_view<const float> v) {
    return reference::matrix(v.rows, v.cols, {v.data, static_cast<std::size_t>(v.rows * v.cols)});
  };
  const moe::ffn_weights& e = m.w.experts;
  const reference::layer formulas{reference::linear_gate(whole(m.w.gate.w)), reference::top_k(K),
                                  reference::feed_forward(whole(e.up), whole(e.gate), whole(e.down), act)};
  const reference::matrix wanted = formulas.forward({5, D, m.x});

  using fixed = moe::static_layer<D, F, E, K, Form>;
  static fixed net;
  net.load(m.w.gate.w, m.w.experts);
  typename fixed::weights dw;
  std::vector<float> y(m.y.size()), dx(m.dx.size());
  for (std::size_t t = 0; t < 5; ++t) {
    typename fixed::context c;
    net.forward(&m.x[t * D], &y[t * D], c);
    net.backward(&m.x[t * D], c, &m.dy[t * D], &dx[t * D], dw);
  }
  CHECK(reference::error(y, wanted.values) < 2e-6);
  for (std::size_t i = 0; i < y.size(); ++i) CHECK(y[i] == doctest::Approx(m.y[i]).epsilon(1e-5));
  for (std::size_t i = 0; i < dx.size(); ++i) CHECK(dx[i] == doctest::Approx(m.dx[i]).epsilon(1e-4));
  // wanted[rows,cols] lies transposed in got[cols,step].
  const auto same = [](const float* got, dim step, moe::matrix_view<const float> want) {
    for (dim r = 0; r < want.rows; ++r)
      for (dim c = 0; c < want.cols; ++c) CHECK(got[c * step + r] == doctest::Approx(want(r, c)).epsilon(1e-4));
  };
  same(dw.router.data(), E, m.dw.gate.w);
  for (dim i = 0; i < E; ++i) {
    constexpr dim wide = Form::gated ? 2 : 1;
    const float* in = dw.in.data() + i * D * wide * F;
    if constexpr (Form::gated) same(in, wide * F, m.dw.experts.gate.slice(i * F, F));
    same(in + (wide - 1) * F, wide * F, m.dw.experts.up.slice(i * F, F));
    same(dw.down.data() + i * F * D, D, m.dw.experts.down.slice(i * D, D));
  }
}

}  // namespace

TEST_SUITE("static_layer") {
  TEST_CASE("a static layer is the run-time layer and the formulas at every level, forward and backward") {
    testing::at_every_level([] {
      compare<6, 10, 4, 2, moe::glu<moe::silu>>(1);
      compare<9, 5, 3, 1, moe::plain<moe::gelu>>(2, gelu);
      compare<4, 4, 2, 2, moe::glu<moe::silu>>(3);
      compare<1, 1, 1, 1, moe::glu<moe::silu>>(4);
      compare<32, 64, 4, 1, moe::glu<moe::silu>>(5);
      compare<23, 37, 7, 3, moe::glu<moe::gelu>>(6, gelu);
      compare<64, 61, 8, 8, moe::plain<moe::silu>>(7);
    });
  }
  TEST_CASE("levels choose the same experts") {
    static moe::static_layer<32, 64, 8, 2> net;
    const auto numbers = testing::normals(static_cast<dim>(net.w.router.size()), 1), x = testing::normals(32 * 50, 2);
    std::copy(numbers.begin(), numbers.end(), net.w.router.begin());
    std::vector<std::vector<moe::idx>> chosen;
    testing::at_every_level([&] {
      std::vector<moe::idx>& all = chosen.emplace_back();
      for (std::size_t t = 0; t < 50; ++t) {
        decltype(net)::context c;
        float y[32];
        net.forward(&x[t * 32], y, c);
        all.insert(all.end(), c.expert.begin(), c.expert.end());
      }
    });
    for (const auto& all : chosen) CHECK(all == chosen[0]);
  }
  TEST_CASE("a score that is not a number never selects") {
    moe::static_layer<2, 2, 2, 1> net;
    const float x[2] = {std::numeric_limits<float>::quiet_NaN(), 0};
    float y[2] = {5, 5};
    decltype(net)::context c;
    net.forward(x, y, c);
    CHECK(c.chosen == 0);
    CHECK(y[0] == 0);
  }
  TEST_CASE("weights of another shape are refused") {
    moe::static_layer<2, 2, 2, 1> net;
    std::vector<float> gate(6);
    CHECK_THROWS_WITH_AS(net.load({gate.data(), 3, 2}, {}), "static_layer: gate is 3 x 2, expected 2 x 2 (E x d)", moe::shape_error);
  }
}
