// SPDX-License-Identifier: Apache-2.0
#include <doctest/doctest.h>

#include "moe/moe.hpp"
#include "support/reference.hpp"
#include "support/testing.hpp"

namespace {

using moe::dim;

template <int K>
using ffn = moe::layer<moe::linear_gate, moe::top_k<K>, moe::ffn_expert, moe::weighted_sum, moe::scalar<>>;

// float32: each result is a sum of n products of values near one, so its rounding is about sqrt(n) 2^-24 of its largest
// terms, through three products in a row: 1e-5 of the largest result holds for n up to a few hundred.
constexpr double tolerance = 1e-5;

struct errors {
  double y, dx, gate_w, up, gate, down;
};

template <int K>
errors compare(dim T, dim d, dim f, dim E, std::uint64_t seed) {
  testing::model<ffn<K>> m(ffn<K>({.tokens = T, .d = d, .f = f, .experts = E}), T, d, seed);
  m.forward();
  m.backward();
  moe::check(m.ctx.plan);
  const auto list = m.net.catalogue();
  const reference::ffn_layer want(K, list, m.weights());
  const reference::matrix x(T, d, m.x);
  const auto g = want.backward(x, {T, d, m.dy});
  const auto off = [&](const char* name, const reference::matrix& wanted) {
    for (const moe::slot& s : list)
      if (s.name == name) return reference::error(m.gradients().subspan(s.offset / 4, s.bytes / 4), wanted.values);
    return 1.;
  };
  return {reference::error(m.y, want.forward(x).values),
          reference::error(m.dx, g.x.values),
          off("gate.w", g.gate_w),
          off("experts.up", g.up),
          off("experts.gate", g.gate),
          off("experts.down", g.down)};
}

template <int K>
void check(dim T, dim d, dim f, dim E) {
  CAPTURE(T);
  CAPTURE(d);
  CAPTURE(f);
  CAPTURE(E);
  CAPTURE(K);
  const errors e = compare<K>(T, d, f, E, static_cast<std::uint64_t>(T + 3 * d + 5 * f + 7 * E + K));
  CHECK(e.y < tolerance);
  CHECK(e.dx < tolerance);
  CHECK(e.gate_w < (K == 1 ? 1e-30 : 10 * tolerance));  // one choice weighs 1 whatever its score
  CHECK(e.up < tolerance);
  CHECK(e.gate < tolerance);
  CHECK(e.down < tolerance);
}

}  // namespace

TEST_SUITE("layer") {
  TEST_CASE("the reference's formulas of the gradient agree with finite differences of its forward") {
    const dim T = 5, d = 4, f = 3, E = 4;
    testing::model<ffn<2>> m(ffn<2>({.tokens = T, .d = d, .f = f, .experts = E}), T, d, 3);
    reference::ffn_layer layer(2, m.net.catalogue(), m.weights());
    reference::matrix x(T, d, m.x);
    const reference::matrix dy(T, d, m.dy);
    const auto g = layer.backward(x, dy);
    const auto loss = [&] { return reference::inner(layer.forward(x), dy); };
    const auto agrees = [&](reference::matrix& at, const reference::matrix& formula) {
      const reference::vec numeric = reference::gradient(at.values, loss);
      double worst = 0;
      for (std::size_t i = 0; i < numeric.size(); ++i) worst = std::max(worst, std::abs(numeric[i] - formula.values[i]));
      return worst < 1e-8;
    };
    CHECK(agrees(x, g.x));
    CHECK(agrees(layer.gate_w, g.gate_w));
    CHECK(agrees(layer.up, g.up));
    CHECK(agrees(layer.gate, g.gate));
    CHECK(agrees(layer.down, g.down));
  }
  TEST_CASE("forward and backward agree with the double-precision reference on odd shapes") {
    check<1>(1, 1, 1, 1);
    check<1>(7, 3, 5, 4);
    check<2>(16, 8, 12, 4);
    check<2>(33, 17, 9, 3);
    check<3>(21, 19, 65, 5);
    check<3>(130, 31, 33, 7);
    check<5>(9, 129, 67, 11);
  }
  TEST_CASE("with one expert the layer is that expert") { check<1>(19, 13, 21, 1); }
  TEST_CASE("with k = E every token visits every expert") { check<3>(19, 13, 21, 3); }
  TEST_CASE("with many experts and few tokens most experts are empty") { check<2>(3, 9, 7, 64); }
  TEST_CASE("a batch of many blocks of rows agrees with the reference") { check<2>(1500, 24, 40, 3); }
}
