// SPDX-License-Identifier: Apache-2.0
#include <doctest/doctest.h>

#include "moe/moe.hpp"
#include "moe/static_layer.hpp"
#include "support/testing.hpp"

namespace {

using backend = moe::scalar<>;

// A static layer and a run-time one with the same weights, on the same tokens, forward and backward.
template <int D, int F, int E, int K, class Form>
void compare(std::uint64_t seed) {
  using run_time = moe::layer<moe::linear_gate, moe::top_k<K>, moe::basic_ffn_expert<Form>, moe::weighted_sum, backend>;
  testing::model<run_time> m(run_time({.tokens = 5, .d = D, .f = F, .experts = E}), 5, D, seed);
  m.forward();
  m.backward();

  using fixed = moe::static_layer<D, F, E, K, Form>;
  static fixed net;
  net.load(m.w.gate.w, m.w.experts);
  typename fixed::weights dw;
  std::vector<float> dx(m.dx.size());
  for (std::size_t t = 0; t < 5; ++t) {
    typename fixed::context c;
    float y[D];
    net.forward(&m.x[t * D], y, c);
    for (std::size_t j = 0; j < D; ++j) CHECK(y[j] == doctest::Approx(m.y[t * D + j]).epsilon(1e-5));
    net.backward(&m.x[t * D], c, &m.dy[t * D], &dx[t * D], dw);
  }
  for (std::size_t i = 0; i < dx.size(); ++i) CHECK(dx[i] == doctest::Approx(m.dx[i]).epsilon(1e-4));
  const auto same = [](const auto& got, moe::matrix_view<const float> wanted, std::size_t first) {
    for (moe::dim i = 0; i < wanted.rows * wanted.cols; ++i)
      CHECK(got[first + static_cast<std::size_t>(i)] == doctest::Approx(wanted.data[i]).epsilon(1e-4));
  };
  same(dw.router, m.dw.gate.w, 0);
  same(dw.down, m.dw.experts.down, 0);
  for (std::size_t e = 0; e < E; ++e) {
    const auto first = static_cast<moe::dim>(e) * F;
    if constexpr (Form::gated) same(dw.in, m.dw.experts.gate.slice(first, F), e * 2 * F * D);
    same(dw.in, m.dw.experts.up.slice(first, F), e * (Form::gated ? 2 : 1) * F * D + (Form::gated ? F * D : 0));
  }
}

}  // namespace

TEST_SUITE("static_layer") {
  TEST_CASE("a static layer is the run-time layer, forward and backward") {
    compare<6, 10, 4, 2, moe::glu<moe::silu>>(1);
    compare<9, 5, 3, 1, moe::plain<moe::gelu>>(2);
    compare<4, 4, 2, 2, moe::glu<moe::silu>>(3);
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
