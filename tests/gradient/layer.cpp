// SPDX-License-Identifier: Apache-2.0
#include <doctest/doctest.h>

#include <cmath>

#include "moe/moe.hpp"
#include "support/testing.hpp"

namespace {

using moe::dim;

template <int K, class Expert = moe::ffn_expert>
using layer = moe::layer<moe::linear_gate, moe::top_k<K>, Expert, moe::weighted_sum, moe::scalar<>>;

/// The linear gate with a gradient for x that is wrong by a twentieth in column 0.
struct wrong_gate : moe::linear_gate {
  template <class B>
  void backward(const moe::call<B>& on, const weights& p, const input& x, const context& ctx,
                moe::matrix_view<const float> dscores, input_grad dx, weights_grad& dp) const noexcept {
    moe::linear_gate::backward(on, p, x, ctx, dscores, dx, dp);
    if (dx)
      for (dim t = 0; t < dx.rows; ++t) dx(t, 0) *= 1.05f;
  }
};

/// Prefers one of two experts by a function of x[0] that changes within any step.
struct chaotic_gate {
  using input = moe::matrix_view<const float>;
  using input_grad = moe::matrix_view<float>;
  using weights = moe::nothing;
  using context = moe::nothing;

  template <class B>
  void forward(const moe::call<B>&, const weights&, const input& x, moe::matrix_view<float> scores,
               context&) const noexcept {
    for (dim t = 0; t < x.rows; ++t) {
      scores(t, 0) = 0;
      scores(t, 1) = std::sin(1e5f * x(t, 0));
    }
  }
  template <class B>
  void backward(const moe::call<B>&, const weights&, const input&, const context&, moe::matrix_view<const float>, input_grad,
                weights&) const noexcept {}
};

template <class L>
void check(const L& net, dim T, dim d, std::uint64_t seed) {
  const auto g = testing::gradcheck(net, T, d, seed);
  INFO("worst in " << g.where << ", skipped " << g.skipped << " of " << g.probed);
  CHECK(g.worst < 1e-2);
  CHECK(g.skipped * 4 < g.probed);
  CHECK(g.probed > T * d);
}

}  // namespace

TEST_SUITE("layer") {
  TEST_CASE("gradients match finite differences over shapes") {
    check(layer<2>({.tokens = 16, .d = 8, .f = 12, .experts = 4}), 16, 8, 1);
    check(layer<2>({.tokens = 5, .d = 3, .f = 7, .experts = 3}), 5, 3, 2);
    check(layer<3>({.tokens = 9, .d = 17, .f = 9, .experts = 5}), 9, 17, 3);
  }
  TEST_CASE("with one choice of one expert the gate has no gradient, and the expert's is right") {
    check(layer<1>({.tokens = 11, .d = 6, .f = 10, .experts = 1}), 11, 6, 4);
    check(layer<1>({.tokens = 11, .d = 6, .f = 10, .experts = 3}), 11, 6, 5);
  }
  TEST_CASE("with k = E gradients reach every expert") {
    check(layer<3>({.tokens = 7, .d = 6, .f = 10, .experts = 3}), 7, 6, 6);
  }
  TEST_CASE("one token alone has gradients") { check(layer<2>({.tokens = 1, .d = 5, .f = 6, .experts = 4}), 1, 5, 7); }

  TEST_CASE("the check finds a gradient that is wrong by a twentieth in one column, and says where") {
    using wrong = moe::layer<wrong_gate, moe::top_k<2>, moe::ffn_expert, moe::weighted_sum, moe::scalar<>>;
    const auto g = testing::gradcheck(wrong({.tokens = 16, .d = 8, .f = 12, .experts = 4}), 16, 8, 1);
    CHECK(g.worst > 2e-2);
    CHECK(g.where.starts_with("x("));
    CHECK(g.where.ends_with(", 0)"));
  }
  TEST_CASE("a kink of relu inside a probe's step does not spoil the check") {
    check(layer<2, moe::basic_ffn_expert<moe::plain<moe::relu>>>({.tokens = 16, .d = 8, .f = 12, .experts = 4}), 16, 8, 8);
  }
  TEST_CASE("probes beside a change of the plan are skipped and counted") {
    using chaotic = moe::layer<chaotic_gate, moe::top_k<1>, moe::ffn_expert, moe::weighted_sum, moe::scalar<>>;
    const auto g = testing::gradcheck(chaotic({.tokens = 12, .d = 3, .f = 4, .experts = 2}), 12, 3, 9);
    INFO("worst in " << g.where);
    CHECK(g.worst < 1e-2);
    CHECK(g.skipped > 0);
    CHECK(g.skipped <= 12);  // column 0 of x alone
    CHECK(g.probed == 12 * 3 + 3 * 2 * 3 * 4);
  }
}
