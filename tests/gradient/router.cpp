// SPDX-License-Identifier: Apache-2.0
// Gates, routers and losses inside a layer: gradients of x and of every weight through gate, routing and experts.
#include <doctest/doctest.h>

#include "moe/moe.hpp"
#include "support/testing.hpp"

namespace {

using moe::dim;

/// Small experts, so that a layer of many routers compiles and probes quickly.
template <class Router, class Gate = moe::linear_gate>
using layer = moe::layer<Gate, Router, moe::basic_ffn_expert<moe::plain<moe::silu>>, moe::weighted_sum, moe::scalar<>>;

constexpr moe::shape sizes{.tokens = 14, .d = 6, .f = 4, .experts = 8};

struct all_losses {
  template <class Context>
  double operator()(const Context& ctx) const noexcept {
    return of(ctx.router);
  }
  template <class Context>
  static double of(const Context& ctx) noexcept {
    double sum = 0;
    if constexpr (requires { ctx.loss; }) sum += double{ctx.loss.value()};
    if constexpr (requires { ctx.inner; }) sum += of(ctx.inner);
    return sum;
  }
};

/// Each probe that moves an assignment is skipped, so few may: k of E experts with capacity move more than k of E without.
template <class L>
void check(const L& net, std::uint64_t seed) {
  const auto g = testing::gradcheck(net, sizes.tokens, sizes.d, seed, all_losses{});
  INFO("worst in " << g.where << ", skipped " << g.skipped << " of " << g.probed);
  CHECK(g.worst < 1e-2);
  CHECK(g.skipped * 4 < g.probed);
  CHECK(g.probed > sizes.tokens * sizes.d);
}

}  // namespace

TEST_SUITE("router") {
  TEST_CASE("score rules: a softmax over all, sigmoids with groups and bias, square roots of softplus") {
    check(layer<moe::olmoe_router<3>>(sizes), 1);
    check(layer<moe::deepseek_v3_router<3>>(sizes, moe::deepseek_v3_router<3>{.groups = 4, .kept = 3}), 2);
    check(layer<moe::deepseek_v4_router<2>>(sizes), 3);
  }
  TEST_CASE("any number of choices") {
    check(layer<moe::top_p<4>>(sizes, moe::top_p<4>{.p = 0.6f}), 4);
    check(layer<moe::threshold<>>(sizes), 5);
    check(layer<moe::expert_choice<2>>(sizes), 6);
  }
  TEST_CASE("capacity: dropped choices keep their share of the sum") {
    using router = moe::capacity<moe::top_k<2>>;
    check(layer<router>(sizes, router{.limit = {.factor = 0.7}}), 7);
    using survivors = moe::renormalised<router>;
    check(layer<survivors>(sizes, survivors{.inner = {.limit = {.factor = 0.7}}}), 8);
  }
}

TEST_SUITE("loss") {
  TEST_CASE("auxiliary losses add their gradients to the gate's weights and to x") {
    using router =
        moe::with_loss<moe::with_loss<moe::with_loss<moe::top_k<2>, moe::importance>, moe::load_balance>, moe::z_loss>;
    check(layer<router>(sizes, router{{{.loss = {.coefficient = 2}}, {.coefficient = 3}}, {.coefficient = 0.5f}}), 9);
  }
}

TEST_SUITE("gate") {
  TEST_CASE("bias, noise and cosine") {
    check(layer<moe::gpt_oss_router<3>, moe::biased_linear_gate>(sizes), 10);
    check(layer<moe::top_k<2>, moe::noisy<>>(sizes), 11);
    check(layer<moe::top_k<2>, moe::cosine_gate>(sizes, moe::cosine_gate{.width = 5}), 12);
  }
}
