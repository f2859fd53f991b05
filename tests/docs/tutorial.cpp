// SPDX-License-Identifier: Apache-2.0
#include <doctest/doctest.h>

#include "moe/moe.hpp"
#include "support/testing.hpp"

namespace {

// [parts]
using B = moe::scalar<>;
// Mixtral: softmax over the two best of eight.
using mixtral = moe::layer<moe::linear_gate, moe::mixtral_router<2>, moe::ffn_expert, moe::weighted_sum, B>;
// DeepSeek-V3: sigmoid scores with a selection bias, the best 4 of 8 groups.
using deepseek = moe::layer<moe::linear_gate, moe::deepseek_v3_router<8>, moe::ffn_expert, moe::weighted_sum, B>;
// gpt-oss: a gate with bias, clamped experts with biases and interleaved rows.
using gpt_oss = moe::layer<moe::biased_linear_gate, moe::gpt_oss_router<4>, moe::gpt_oss_expert, moe::weighted_sum, B>;
// Llama-4: one expert, its input weighed by a sigmoid.
using llama4 = moe::layer<moe::linear_gate, moe::llama4_router<1>, moe::weigh_input<moe::ffn_expert>, moe::unweighted_sum, B>;
// Feature-wise modulation, mixed before one shared trunk.
using film = moe::layer<moe::cosine_gate, moe::top_k<2>, moe::film_expert, moe::mix_before_trunk<moe::ffn_expert>, B>;
// At most the mean load for an expert; a token that finds no room passes unchanged.
using bounded = moe::layer<moe::linear_gate, moe::capacity<moe::top_k<2>>, moe::ffn_expert, moe::residual<>, B>;
// [/parts]

template <class L>
void runs(moe::shape s) {
  testing::model<L> m(L(s), s.tokens, s.d, 1);
  m.forward();
  m.backward();
  double norm = 0;
  for (float v : m.gradients()) norm += double{v} * v;
  CHECK(std::isfinite(norm));
  CHECK(norm > 0);
}

}  // namespace

TEST_SUITE("docs/tutorial") {
  TEST_CASE("the layers of the page run forward and backward") {
    runs<mixtral>({.tokens = 16, .d = 8, .f = 12, .experts = 8});
    runs<deepseek>({.tokens = 16, .d = 8, .f = 12, .experts = 64});
    runs<gpt_oss>({.tokens = 16, .d = 8, .f = 12, .experts = 32});
    runs<llama4>({.tokens = 16, .d = 8, .f = 12, .experts = 16});
    runs<film>({.tokens = 16, .d = 8, .f = 12, .experts = 8});
    runs<bounded>({.tokens = 16, .d = 8, .f = 12, .experts = 8});
  }
  TEST_CASE("an auxiliary loss is read from the context") {
    const moe::dim T = 16, d = 8;
    // [loss]
    using router = moe::with_loss<moe::with_loss<moe::top_k<2>, moe::load_balance>, moe::z_loss>;
    using balanced = moe::layer<moe::linear_gate, router, moe::ffn_expert, moe::weighted_sum, B>;
    const balanced layer({.tokens = T, .d = d, .f = 12, .experts = 8}, router{{.loss = {.coefficient = 0.01f}}, {.coefficient = 1e-3f}});
    // [/loss]
    testing::model<balanced> m(layer, T, d, 1);
    m.forward();
    CHECK(m.ctx.router.inner.loss.value() == doctest::Approx(0.02).epsilon(0.5));  // coefficient times k, near balance
    CHECK(m.ctx.router.loss.value() > 0);
  }
  TEST_CASE("rounded routing trains with whole tiles, and the same weights are evaluated without") {
    const moe::dim T = 64, d = 8;
    // [rounding]
    using rounded = moe::token_rounding<2>;
    using training = moe::layer<moe::linear_gate, rounded, moe::ffn_expert, moe::weighted_sum, B>;
    using evaluation = moe::layer<moe::linear_gate, moe::top_k<2>, moe::ffn_expert, moe::weighted_sum, B>;
    const moe::shape sizes{.tokens = T, .d = d, .f = 12, .experts = 4};
    const training train(sizes, rounded{.tile = moe::row_tile<B>});  // rows of a tile of this backend
    const evaluation evaluate(sizes);                                // the same flat buffer of weights
    // [/rounding]
    testing::model<training> m(train, T, d, 1);
    m.forward();
    m.backward();
    for (const moe::idx first : m.ctx.plan.offsets) CHECK(first % moe::row_tile<B> == 0);
    CHECK(m.ctx.plan.rows() > 0);
    testing::model<evaluation> e(evaluate, T, d, 1);
    CHECK(e.weights().size() == m.weights().size());
    std::copy(m.weights().begin(), m.weights().end(), e.weights().begin());
    e.forward();
    for (moe::dim t = 0; t < T; ++t)
      CHECK(e.ctx.plan.token_offsets[static_cast<std::size_t>(t)] == 2 * t);
  }
}
